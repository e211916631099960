/* environ.c against the vectors that uenvd/views.py passes too, through the fake libslurm. */
#include "check.h"
#include "environ.h"
#include "spank_fake.h"
#include "spank_wrap.h"

#include <json-c/json.h>

static void prepare(struct json_object *test, struct env_ops *ops, struct failure *failure)
{
    fake_reset(S_CTX_REMOTE);
    json_object_object_foreach(json_object_object_get(test, "environ"), name, value)
    {
        fake_setenv(name, json_object_get_string(value));
    }
    const char *applied = json_object_get_string(json_object_object_get(test, "applied"));
    CHECK(env_ops_parse(json_object_object_get(test, "ops"), applied, ops, failure));
}

/* What differs must be exactly what is expected. */
static void compare(struct json_object *test, const char *title)
{
    struct json_object *before = json_object_object_get(test, "environ"), *expected = json_object_object_get(test, "expect");
    int count = json_object_object_length(before);
    json_object_object_foreach(expected, name, value)
    {
        bool existed = json_object_object_get_ex(before, name, NULL);
        CHECK_IN(value || !fake_getenv(name), title);
        if (value)
            CHECK_TEXT(fake_getenv(name), json_object_get_string(value));
        count += (value ? 1 : 0) - (existed ? 1 : 0);
    }
    json_object_object_foreach(before, old_name, old_value)
    {
        if (!json_object_object_get_ex(expected, old_name, NULL))
            CHECK_TEXT(fake_getenv(old_name), json_object_get_string(old_value));
    }
    CHECK_IN(fake_variable_count() == count, title);
}

TEST(environment_vectors)
{
    struct json_object *tests = read_vectors("views/apply.json");
    CHECK(json_object_array_length(tests) >= 40);
    for (size_t i = 0; i < json_object_array_length(tests); i++) {
        struct json_object *test = json_object_array_get_idx(tests, i);
        const char *title = json_object_get_string(json_object_object_get(test, "name"));
        struct env_ops ops;
        struct failure failure = FAILURE_NONE;
        prepare(test, &ops, &failure);
        struct env_access access = sw_environ(NULL);
        CHECK_IN(environ_apply(&ops, &access, &failure), title);
        compare(test, title);
        env_ops_free(&ops);
    }
    json_object_put(tests);
}

TEST(environment_survives_every_failed_allocation)
{
    struct json_object *tests = read_vectors("views/apply.json");
    for (size_t i = 0; i < json_object_array_length(tests); i++) {
        struct json_object *test = json_object_array_get_idx(tests, i);
        if (json_object_array_length(json_object_object_get(test, "ops")) > 12)
            continue;
        bool fine = false;
        for (long at = 0; !fine && at < 1000; at++) {
            struct env_ops ops;
            struct failure failure = FAILURE_NONE;
            prepare(test, &ops, &failure);
            struct env_access access = sw_environ(NULL);
            fail_allocation = at;
            fine = environ_apply(&ops, &access, &failure);
            fail_allocation = -1;
            CHECK(fine != failure.set);
            if (!fine)
                CHECK(*failure_message(&failure));
            failure_clear(&failure);
            env_ops_free(&ops);
        }
        CHECK(fine);
        compare(test, "after failures");
    }
    json_object_put(tests);
}

static void refuse(const char *function)
{
    struct json_object *array = json_tokener_parse("[[\"set\",\"A\",\"${@B@}\"],[\"prepend\",\"L\",[\"x\"]],[\"unset\",\"U\"]]");
    for (int from = 0; from < 2; from++) {
        struct env_ops ops;
        struct failure failure = FAILURE_NONE;
        fake_reset(S_CTX_REMOTE);
        fake_setenv("U", "1");
        CHECK(env_ops_parse(array, "k", &ops, &failure));
        struct env_access access = sw_environ(NULL);
        fake.failing = function;
        fake.failing_from = strcmp(function, "spank_unsetenv") ? from : 0;
        CHECK(!environ_apply(&ops, &access, &failure));
        CHECK_TEXT(failure.code, "internal");
        failure_clear(&failure);
        env_ops_free(&ops);
    }
    json_object_put(array);
}

TEST(environment_that_slurm_refuses_to_change)
{
    refuse("spank_getenv");
    refuse("spank_setenv");
    refuse("spank_unsetenv");
}

TEST(long_values_are_read_whole)
{
    enum { LENGTH = 100000 };
    char *value = malloc(LENGTH + 1);
    memset(value, 'v', LENGTH);
    value[LENGTH] = '\0';
    fake_reset(S_CTX_REMOTE);
    fake_setenv("LONG", value);
    bool ok;
    char *copy = sw_getenv(NULL, "LONG", &ok);
    CHECK(ok && copy && !strcmp(copy, value));
    free(copy);
    free(value);
    CHECK(sw_getenv(NULL, "ABSENT", &ok) == NULL && ok);
    fake_reset(S_CTX_REMOTE);
}
