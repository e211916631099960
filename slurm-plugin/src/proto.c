#include "proto.h"

#include "client.h"

#include <json-c/json.h>
#include <stdlib.h>
#include <string.h>

#define VERSION 1
#define MAX_DEPTH 16

static bool malformed(struct failure *failure, const char *what)
{
    return failure_set(failure, CODE_PROTOCOL, HINT_PROTOCOL, "an answer of uenvd is malformed: %s", what);
}

/* ---- requests */

static bool valid_utf8(const char *text)
{
    const unsigned char *p = (const unsigned char *)text;
    while (*p) {
        int more = *p < 0x80 ? 0 : *p >= 0xc2 && *p <= 0xdf ? 1 : (*p & 0xf0) == 0xe0 ? 2 : *p >= 0xf0 && *p <= 0xf4 ? 3 : -1;
        if (more < 0 || (*p == 0xe0 && p[1] < 0xa0) || (*p == 0xed && p[1] > 0x9f) || (*p == 0xf0 && p[1] < 0x90) ||
            (*p == 0xf4 && p[1] > 0x8f))
            return false;
        for (p++; more > 0; more--, p++)
            if ((*p & 0xc0) != 0x80)
                return false;
    }
    return true;
}

static bool add(struct json_object *object, const char *key, struct json_object *value)
{
    if (value && json_object_object_add(object, key, value) == 0)
        return true;
    json_object_put(value);
    return false;
}

static bool add_text(struct json_object *object, const char *key, const char *text)
{
    return !text || add(object, key, json_object_new_string(text));
}

static bool add_number(struct json_object *object, const char *key, int64_t number)
{
    return number < 0 || add(object, key, json_object_new_int64(number));
}

/* Of more groups the frame might become too long; then uenvd looks them up. */
#define MAX_GROUPS 512

static bool add_groups(struct json_object *frame, const struct request *request)
{
    if (request->gid < 0 || request->group_count > MAX_GROUPS)
        return true;
    struct json_object *groups = json_object_new_array();
    if (!groups || !add(frame, "groups", groups) || !add_number(frame, "gid", request->gid))
        return false;
    for (size_t i = 0; i < request->group_count; i++) {
        struct json_object *group = json_object_new_int64(request->groups[i]);
        if (!group || json_object_array_add(groups, group) < 0) {
            json_object_put(group);
            return false;
        }
    }
    return true;
}

static bool fill(struct json_object *frame, const struct request *request)
{
    if (!add_number(frame, "v", VERSION) || !add_text(frame, "op", request->op) || !add_text(frame, "uenv", request->uenv) ||
        !add_text(frame, "view", request->view) || !add_text(frame, "cwd", request->cwd) ||
        !add_text(frame, "lease", request->lease) || !add_number(frame, "uid", request->uid) || !add_groups(frame, request))
        return false;
    if (request->submit && !add(frame, "submit", json_object_new_boolean(true)))
        return false;
    if (request->job < 0)
        return true;
    struct json_object *job = json_object_new_object();
    return job && add(frame, "job", job) && add_number(job, "id", request->job) && add_number(job, "step", request->step);
}

char *request_encode(const struct request *request, struct failure *failure)
{
    const char *texts[] = {request->uenv, request->view, request->cwd, request->lease};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        if (texts[i] && !valid_utf8(texts[i])) {
            failure_set(failure, CODE_USAGE, NULL, "labels, views and paths must be UTF-8 text");
            return NULL;
        }
    }
    char *line = NULL;
    struct json_object *frame = json_object_new_object();
    const char *text = NULL;
    size_t length = 0;
    if (frame && fill(frame, request))
        text = json_object_to_json_string_length(frame, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE, &length);
    if (text && length + 1 > MAX_REQUEST_BYTES) {
        failure_set(failure, CODE_USAGE, NULL, "the list of labels is too long");
    } else if (text && (line = malloc(length + 2))) {
        memcpy(line, text, length);
        memcpy(line + length, "\n", 2);
    } else {
        failure_memory(failure);
    }
    json_object_put(frame);
    return line;
}

/* ---- replies */

/* A string without NUL inside, or NULL. */
static const char *text_of(struct json_object *value)
{
    if (!value || !json_object_is_type(value, json_type_string))
        return NULL;
    const char *text = json_object_get_string(value);
    return strlen(text) == (size_t)json_object_get_string_len(value) ? text : NULL;
}

static struct json_object *member(struct json_object *object, const char *key, enum json_type type)
{
    struct json_object *value;
    if (!object || !json_object_object_get_ex(object, key, &value) || !json_object_is_type(value, type))
        return NULL;
    return value;
}

static const char *text_member(struct json_object *object, const char *key)
{
    return text_of(member(object, key, json_type_string));
}

static int64_t number_member(struct json_object *object, const char *key)
{
    struct json_object *value = member(object, key, json_type_int);
    return value ? json_object_get_int64(value) : -1;
}

static bool report(struct json_object *body, struct failure *reported, struct failure *failure)
{
    struct json_object *error = member(body, "error", json_type_object);
    const char *code = text_member(error, "code");
    const char *message = text_member(error, "message");
    if (!code || !message)
        return malformed(failure, "a failure without its error");
    failure_set(reported, code, text_member(error, "hint"), "%s", message);
    return true;
}

bool reply_parse(struct reply *reply, const char *frame, size_t length, struct failure *reported, struct failure *failure)
{
    *reply = (struct reply)REPLY_NONE;
    if (length > MAX_REPLY_BYTES)
        return malformed(failure, "it is too long");
    struct json_tokener *tokener = json_tokener_new_ex(MAX_DEPTH);
    if (!tokener)
        return failure_memory(failure);
    json_tokener_set_flags(tokener, JSON_TOKENER_STRICT | JSON_TOKENER_VALIDATE_UTF8);
    struct json_object *body = json_tokener_parse_ex(tokener, frame, (int)length);
    bool whole = json_tokener_get_error(tokener) == json_tokener_success && json_tokener_get_parse_end(tokener) == length;
    json_tokener_free(tokener);
    if (!whole || !body || !json_object_is_type(body, json_type_object)) {
        json_object_put(body);
        return malformed(failure, "it is no JSON object");
    }
    bool fine = true;
    struct json_object *ok = member(body, "ok", json_type_boolean);
    if (text_member(body, "event")) {
        reply->kind = REPLY_EVENT;
    } else if (!ok) {
        fine = malformed(failure, "it is neither an event nor an answer");
    } else if (json_object_get_boolean(ok)) {
        reply->kind = REPLY_SUCCESS;
    } else {
        reply->kind = REPLY_FAILURE;
        fine = report(body, reported, failure);
    }
    if (fine)
        reply->body = body;
    else
        json_object_put(body);
    return fine;
}

void reply_free(struct reply *reply)
{
    json_object_put(reply->body);
    *reply = (struct reply)REPLY_NONE;
}

void reply_progress(const struct reply *reply, struct progress *progress)
{
    const char *message = text_member(reply->body, "message");
    int64_t total_bytes = number_member(reply->body, "total_bytes");
    progress->message = message ? message : "";
    progress->done_bytes = number_member(reply->body, "done_bytes");
    progress->total_bytes = total_bytes > 0 ? total_bytes : -1;
}

const char *reply_note(const struct reply *reply, size_t index)
{
    struct json_object *notes = member(reply->body, "notes", json_type_array);
    return notes && index < json_object_array_length(notes) ? text_of(json_object_array_get_idx(notes, index)) : NULL;
}

bool reply_resolved(const struct reply *reply, const char **resolved, struct failure *failure)
{
    *resolved = text_member(reply->body, "resolved");
    return *resolved && **resolved ? true : malformed(failure, "'resolved' is missing");
}

static bool copy(char **target, const char *text)
{
    *target = strdup(text);
    return *target != NULL;
}

static bool parse_mount(struct json_object *object, struct mount_point *mount, struct failure *failure)
{
    if (!json_object_is_type(object, json_type_object))
        return malformed(failure, "an element of 'mounts' is no object");
    const char *path = text_member(object, "mount");
    const char *label = text_member(object, "label");
    const char *digest = text_member(object, "digest");
    const char *guard = text_member(object, "guard");
    if (!path || path[0] != '/' || !label || !guard || (strcmp(guard, "listed") && strcmp(guard, "owned")))
        return malformed(failure, "an element of 'mounts' lacks its path, label or guard");
    mount->owned = !strcmp(guard, "owned");
    if (!copy(&mount->path, path) || !copy(&mount->label, label) || (digest && !copy(&mount->digest, digest)))
        return failure_memory(failure);
    return true;
}

bool reply_mounts(const struct reply *reply, struct mounts *mounts, struct failure *failure)
{
    *mounts = (struct mounts)MOUNTS_NONE;
    struct json_object *array = member(reply->body, "mounts", json_type_array);
    const char *lease = text_member(reply->body, "lease");
    const char *state = text_member(reply->body, "state");
    if (!array || !json_object_array_length(array) || !lease || !state || (strcmp(state, "ready") && strcmp(state, "waiting")))
        return malformed(failure, "'mounts', 'lease' or 'state' is missing");
    size_t count = json_object_array_length(array);
    mounts->waiting = !strcmp(state, "waiting");
    mounts->items = calloc(count, sizeof *mounts->items);
    bool fine = (mounts->items && copy(&mounts->lease, lease)) || failure_memory(failure);
    for (size_t i = 0; fine && i < count; i++) {
        mounts->count = i + 1;
        fine = parse_mount(json_object_array_get_idx(array, i), &mounts->items[i], failure);
    }
    if (!fine)
        mounts_free(mounts);
    return fine;
}

void mounts_free(struct mounts *mounts)
{
    for (size_t i = 0; i < mounts->count; i++) {
        free(mounts->items[i].path);
        free(mounts->items[i].label);
        free(mounts->items[i].digest);
    }
    free(mounts->items);
    free(mounts->lease);
    *mounts = (struct mounts)MOUNTS_NONE;
}

/* ---- environment operations */

static bool parse_kind(const char *word, enum env_op_kind *kind)
{
    static const struct {
        const char *word;
        enum env_op_kind kind;
    } kinds[] = {{"set", ENV_SET}, {"unset", ENV_UNSET}, {"assign", ENV_ASSIGN}, {"prepend", ENV_PREPEND}, {"append", ENV_APPEND}};
    for (size_t i = 0; word && i < sizeof kinds / sizeof *kinds; i++) {
        if (!strcmp(word, kinds[i].word)) {
            *kind = kinds[i].kind;
            return true;
        }
    }
    return false;
}

static bool parse_values(struct json_object *value, struct env_op *op, struct failure *failure)
{
    bool scalar = op->kind == ENV_SET;
    if (!json_object_is_type(value, scalar ? json_type_string : json_type_array))
        return malformed(failure, "an operation in 'env' has a value of the wrong type");
    size_t count = scalar ? 1 : json_object_array_length(value);
    op->values = calloc(count + 1, sizeof *op->values);
    if (!op->values)
        return failure_memory(failure);
    for (size_t i = 0; i < count; i++) {
        const char *text = text_of(scalar ? value : json_object_array_get_idx(value, i));
        if (!text)
            return malformed(failure, "a value in 'env' is no text");
        if (!copy(&op->values[i], text))
            return failure_memory(failure);
        op->value_count = i + 1;
    }
    return true;
}

static bool parse_op(struct json_object *array, struct env_op *op, struct failure *failure)
{
    size_t length = json_object_is_type(array, json_type_array) ? json_object_array_length(array) : 0;
    if (length < 2 || !parse_kind(text_of(json_object_array_get_idx(array, 0)), &op->kind))
        return malformed(failure, "an unknown operation in 'env'");
    const char *name = text_of(json_object_array_get_idx(array, 1));
    if (!name || !*name || strchr(name, '='))
        return malformed(failure, "a name in 'env' is no name of a variable");
    if (length != (op->kind == ENV_UNSET ? 2 : 3))
        return malformed(failure, "an operation in 'env' has the wrong length");
    if (!copy(&op->name, name))
        return failure_memory(failure);
    return op->kind == ENV_UNSET || parse_values(json_object_array_get_idx(array, 2), op, failure);
}

bool env_ops_parse(struct json_object *array, const char *applied, struct env_ops *ops, struct failure *failure)
{
    *ops = (struct env_ops)ENV_OPS_NONE;
    if (!applied || !json_object_is_type(array, json_type_array))
        return malformed(failure, "'env' or 'applied' is missing");
    size_t count = json_object_array_length(array);
    ops->items = calloc(count + 1, sizeof *ops->items);
    bool fine = (ops->items && copy(&ops->applied, applied)) || failure_memory(failure);
    for (size_t i = 0; fine && i < count; i++) {
        ops->count = i + 1;
        fine = parse_op(json_object_array_get_idx(array, i), &ops->items[i], failure);
    }
    if (!fine)
        env_ops_free(ops);
    return fine;
}

bool reply_env_ops(const struct reply *reply, struct env_ops *ops, struct failure *failure)
{
    return env_ops_parse(member(reply->body, "env", json_type_array), text_member(reply->body, "applied"), ops, failure);
}

void env_ops_free(struct env_ops *ops)
{
    for (size_t i = 0; i < ops->count; i++) {
        struct env_op *op = &ops->items[i];
        for (size_t j = 0; j < op->value_count; j++)
            free(op->values[j]);
        free(op->values);
        free(op->name);
    }
    free(ops->items);
    free(ops->applied);
    *ops = (struct env_ops)ENV_OPS_NONE;
}
