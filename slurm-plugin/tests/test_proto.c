/* proto.c against the golden frames, all their truncations, mutations, and failed allocations. */
#include "check.h"
#include "client.h"
#include "proto.h"

#include <json-c/json.h>

static const char *text_at(struct json_object *object, const char *key)
{
    struct json_object *value;
    return json_object_object_get_ex(object, key, &value) && value ? json_object_get_string(value) : NULL;
}

static int64_t number_at(struct json_object *object, const char *key)
{
    struct json_object *value;
    return json_object_object_get_ex(object, key, &value) ? json_object_get_int64(value) : -1;
}

static struct request request_of(struct json_object *args)
{
    static gid_t groups[8];
    struct json_object *given = json_object_object_get(args, "groups");
    size_t count = given ? json_object_array_length(given) : 0;
    CHECK(count <= sizeof groups / sizeof *groups);
    for (size_t i = 0; i < count; i++)
        groups[i] = (gid_t)json_object_get_int64(json_object_array_get_idx(given, i));
    return (struct request){
        .op = text_at(args, "op"),
        .uenv = text_at(args, "uenv"),
        .view = text_at(args, "view"),
        .cwd = text_at(args, "cwd"),
        .lease = text_at(args, "lease"),
        .uid = number_at(args, "uid"),
        .gid = number_at(args, "gid"),
        .groups = groups,
        .group_count = count,
        .job = number_at(args, "job"),
        .step = number_at(args, "step"),
        .submit = json_object_get_boolean(json_object_object_get(args, "submit")),
    };
}

TEST(requests_are_the_golden_frames)
{
    struct json_object *tests = read_vectors("control/requests.json");
    for (size_t i = 0; i < json_object_array_length(tests); i++) {
        struct json_object *test = json_object_array_get_idx(tests, i);
        struct request request = request_of(json_object_object_get(test, "args"));
        struct failure failure = FAILURE_NONE;
        char *line = request_encode(&request, &failure);
        CHECK_IN(line && strchr(line, '\n') == line + strlen(line) - 1, text_at(test, "name"));
        struct json_object *frame = json_tokener_parse(line);
        CHECK_IN(json_object_equal(frame, json_object_object_get(test, "frame")), line);
        json_object_put(frame);
        free(line);
    }
    json_object_put(tests);
}

static void check_refused(const char *uenv, const char *code)
{
    struct request request = REQUEST_EMPTY;
    request.op = "resolve";
    request.uenv = uenv;
    struct failure failure = FAILURE_NONE;
    CHECK(!request_encode(&request, &failure));
    CHECK_TEXT(failure.code, code);
    failure_clear(&failure);
}

TEST(requests_that_cannot_be_sent)
{
    static const char *const invalid[] = {"\xff", "a\x80", "\xc0\xaf", "\xe0\x80\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xf0\x8f\xbf\xbf", "\xc3", "\xe4\xb8", "\xf5\x80\x80\x80"};
    for (size_t i = 0; i < sizeof invalid / sizeof *invalid; i++)
        check_refused(invalid[i], CODE_USAGE);
    char *large = malloc(MAX_REQUEST_BYTES + 1);
    memset(large, 'x', MAX_REQUEST_BYTES);
    large[MAX_REQUEST_BYTES] = '\0';
    check_refused(large, CODE_USAGE);
    large[MAX_REQUEST_BYTES - 100] = '\0';
    struct request request = REQUEST_EMPTY;
    request.op = "resolve";
    request.uenv = large;
    struct failure failure = FAILURE_NONE;
    char *line = request_encode(&request, &failure);
    CHECK(line && strlen(line) <= MAX_REQUEST_BYTES);
    free(line);
    free(large);
}

TEST(too_many_groups_are_left_for_uenvd_to_look_up)
{
    static gid_t groups[513];
    for (size_t count = 512; count <= 513; count++) {
        struct request request = REQUEST_EMPTY;
        request.op = "mount";
        request.uenv = "a";
        request.uid = request.gid = 1;
        request.groups = groups;
        request.group_count = count;
        struct failure failure = FAILURE_NONE;
        char *line = request_encode(&request, &failure);
        CHECK(line && strstr(line, "\"uid\":1"));
        CHECK((strstr(line, "\"groups\":") != NULL) == (count == 512));
        CHECK((strstr(line, "\"gid\":1") != NULL) == (count == 512));
        free(line);
    }
}

static void check_event(const struct reply *reply, struct json_object *expect)
{
    struct progress progress;
    reply_progress(reply, &progress);
    CHECK_TEXT(progress.message, text_at(expect, "message"));
    CHECK(progress.done_bytes == number_at(expect, "done_bytes"));
    CHECK(progress.total_bytes == number_at(expect, "total_bytes"));
}

static void check_notes(const struct reply *reply, struct json_object *expect)
{
    struct json_object *notes = json_object_object_get(expect, "notes");
    for (size_t i = 0; notes && i < json_object_array_length(notes); i++)
        CHECK_TEXT(reply_note(reply, i), json_object_get_string(json_object_array_get_idx(notes, i)));
    CHECK(reply_note(reply, notes ? json_object_array_length(notes) : 0) == NULL);
}

static void check_mounts(const struct mounts *mounts, struct json_object *expect)
{
    struct json_object *array = json_object_object_get(expect, "mounts");
    CHECK(mounts->count == json_object_array_length(array));
    CHECK(mounts->waiting == json_object_get_boolean(json_object_object_get(expect, "waiting")));
    CHECK_TEXT(mounts->lease, text_at(expect, "lease"));
    for (size_t i = 0; i < mounts->count; i++) {
        struct json_object *one = json_object_array_get_idx(array, i);
        CHECK_TEXT(mounts->items[i].path, text_at(one, "path"));
        CHECK_TEXT(mounts->items[i].label, text_at(one, "label"));
        CHECK_TEXT(mounts->items[i].digest, text_at(one, "digest"));
        CHECK(mounts->items[i].owned == json_object_get_boolean(json_object_object_get(one, "owned")));
    }
}

static void check_ops(const struct env_ops *ops, struct json_object *expect)
{
    static const char *const words[] = {"set", "unset", "assign", "prepend", "append"};
    struct json_object *array = json_object_object_get(expect, "ops");
    CHECK(ops->count == json_object_array_length(array));
    CHECK_TEXT(ops->applied, text_at(expect, "applied"));
    for (size_t i = 0; i < ops->count; i++) {
        struct json_object *one = json_object_array_get_idx(array, i), *value = json_object_array_get_idx(one, 2);
        const struct env_op *op = &ops->items[i];
        CHECK_TEXT(words[op->kind], json_object_get_string(json_object_array_get_idx(one, 0)));
        CHECK_TEXT(op->name, json_object_get_string(json_object_array_get_idx(one, 1)));
        bool list = json_object_is_type(value, json_type_array);
        CHECK(op->value_count == (list ? json_object_array_length(value) : value ? 1 : 0));
        for (size_t j = 0; j < op->value_count; j++)
            CHECK_TEXT(op->values[j], json_object_get_string(list ? json_object_array_get_idx(value, j) : value));
    }
}

/* Read a success as the operation's answer; what it means is compared where `expect` is given. */
static bool use_success(const struct reply *reply, const char *op, struct json_object *expect, struct failure *failure)
{
    if (!strcmp(op, "resolve")) {
        const char *resolved;
        bool fine = reply_resolved(reply, &resolved, failure);
        if (fine && expect) {
            CHECK_TEXT(resolved, text_at(expect, "resolved"));
            check_notes(reply, expect);
        }
        return fine;
    }
    struct mounts mounts = MOUNTS_NONE;
    struct env_ops ops = ENV_OPS_NONE;
    bool fine = strcmp(op, "mount") || reply_mounts(reply, &mounts, failure);
    if (fine && !mounts.waiting) {
        fine = reply_env_ops(reply, &ops, failure);
        if (fine && expect)
            check_ops(&ops, expect);
    }
    if (fine && expect && mounts.count)
        check_mounts(&mounts, expect);
    mounts_free(&mounts);
    env_ops_free(&ops);
    return fine;
}

static void check_reply(struct json_object *test)
{
    const char *title = text_at(test, "name"), *kind = text_at(test, "kind"), *frame = text_at(test, "frame");
    struct json_object *expect = json_object_object_get(test, "expect");
    struct reply reply;
    struct failure reported = FAILURE_NONE, failure = FAILURE_NONE;
    bool fine = reply_parse(&reply, frame, strlen(frame), &reported, &failure);
    CHECK_IN(fine == (strcmp(kind, "malformed") != 0), title);
    if (!fine) {
        CHECK_TEXT(failure.code, CODE_PROTOCOL);
    } else if (!strcmp(kind, "event")) {
        CHECK_IN(reply.kind == REPLY_EVENT, title);
        check_event(&reply, expect);
    } else if (!strcmp(kind, "failure")) {
        CHECK_IN(reply.kind == REPLY_FAILURE && reported.set, title);
        CHECK_TEXT(reported.code, text_at(expect, "code"));
        CHECK_TEXT(reported.message, text_at(expect, "message"));
        CHECK_TEXT(reported.hint, text_at(expect, "hint"));
    } else {
        bool success = !strcmp(kind, "success");
        CHECK_IN(reply.kind == REPLY_SUCCESS, title);
        CHECK_IN(use_success(&reply, text_at(test, "op"), success ? expect : NULL, &failure) == success, title);
        if (!success)
            CHECK_TEXT(failure.code, CODE_PROTOCOL);
    }
    reply_free(&reply);
    failure_clear(&reported);
    failure_clear(&failure);
}

TEST(replies_are_read_as_the_vectors_say)
{
    struct json_object *tests = read_vectors("control/replies.json");
    CHECK(json_object_array_length(tests) >= 50);
    for (size_t i = 0; i < json_object_array_length(tests); i++)
        check_reply(json_object_array_get_idx(tests, i));
    json_object_put(tests);
}

/* Whatever the bytes: an answer or an error, nothing else. */
static bool digest(const char *bytes, size_t length, const char *op)
{
    char *frame = malloc(length + 1);
    CHECK(frame != NULL);
    memcpy(frame, bytes, length);
    frame[length] = '\0';
    struct reply reply;
    struct failure reported = FAILURE_NONE, failure = FAILURE_NONE;
    bool fine = reply_parse(&reply, frame, length, &reported, &failure);
    if (fine && reply.kind == REPLY_SUCCESS)
        fine = use_success(&reply, op, NULL, &failure);
    CHECK(fine || failure.set);
    reply_free(&reply);
    failure_clear(&reported);
    failure_clear(&failure);
    free(frame);
    return fine;
}

TEST(truncated_and_damaged_replies_are_errors_or_answers)
{
    static const char *const ops[] = {"resolve", "mount", "wait"};
    struct json_object *tests = read_vectors("control/replies.json");
    unsigned int seed = 1;
    for (size_t i = 0; i < json_object_array_length(tests); i++) {
        const char *frame = text_at(json_object_array_get_idx(tests, i), "frame");
        size_t length = strlen(frame);
        for (size_t cut = 0; cut < length; cut++)
            digest(frame, cut, ops[cut % 3]);
        char *damaged = malloc(length + 1);
        for (int round = 0; length && round < 100; round++) {
            memcpy(damaged, frame, length);
            for (int flips = 1 + round % 3; flips; flips--)
                damaged[(size_t)rand_r(&seed) % length] = (char)rand_r(&seed);
            digest(damaged, length, ops[round % 3]);
        }
        free(damaged);
    }
    json_object_put(tests);
}

TEST(replies_survive_every_failed_allocation)
{
    struct json_object *tests = read_vectors("control/replies.json");
    for (size_t i = 0; i < json_object_array_length(tests); i++) {
        struct json_object *test = json_object_array_get_idx(tests, i);
        const char *frame = text_at(test, "frame"), *op = text_at(test, "op"), *kind = text_at(test, "kind");
        struct reply reply;
        struct failure reported = FAILURE_NONE, failure = FAILURE_NONE;
        if (strcmp(kind, "success"))
            continue;
        bool fine = false;
        for (long at = 0; !fine && at < 1000; at++) {
            fail_allocation = at;
            fine = reply_parse(&reply, frame, strlen(frame), &reported, &failure) && use_success(&reply, op, NULL, &failure);
            fail_allocation = -1;
            CHECK(fine != failure.set);
            reply_free(&reply);
            failure_clear(&failure);
        }
        CHECK(fine);
    }
    json_object_put(tests);
}
