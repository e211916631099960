/* args.c, describe.c, report.c: small and pure. */
#include "args.h"
#include "check.h"
#include "describe.h"
#include "report.h"
#include "spank_fake.h"

#include <sys/mman.h>
#include <unistd.h>

TEST(arguments_of_plugstack)
{
    struct settings settings;
    struct failure failure = FAILURE_NONE;
    char *const good[] = {"socket=/x/y", "timeout_ms=250", "silence_ms=1000", "peer_uid=1001"};
    CHECK(settings_parse(&settings, 4, good, &failure));
    CHECK_TEXT(settings.socket, "/x/y");
    CHECK(settings.timeout_ms == 250 && settings.silence_ms == 1000 && settings.peer_uid == 1001);
    CHECK(settings_parse(&settings, 0, NULL, &failure));
    CHECK_TEXT(settings.socket, "/run/uenvd/control");
    CHECK(settings.timeout_ms == 3000 && settings.silence_ms == 5000 && settings.peer_uid == 0);
    CHECK(!settings.login_optional && settings.namespace_owner == NAMESPACE_AUTO);
    char *const site[] = {"login=optional", "namespace=task"};
    CHECK(settings_parse(&settings, 2, site, &failure));
    CHECK(settings.login_optional && settings.namespace_owner == NAMESPACE_TASK);
    char *const usual[] = {"login=required", "namespace=step"};
    CHECK(settings_parse(&settings, 2, usual, &failure));
    CHECK(!settings.login_optional && settings.namespace_owner == NAMESPACE_STEP);
    char long_path[300] = "socket=/";
    memset(long_path + 8, 'x', sizeof long_path - 9);
    char *const bad[] = {"socket=", "socket=relative", long_path, "timeout_ms=", "timeout_ms=99", "timeout_ms=60001", "timeout_ms=1e3", "timeout_ms=250x",
                         "timeout_ms=99999999999999999999", "silence_ms=-1", "peer_uid=-1", "peer_uid=4294967295", "peer_uid=root", "", "Socket=/x", "socket",
                         "login=", "login=maybe", "namespace=", "namespace=job"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char *const arguments[] = {"socket=/x/y", bad[i]};
        CHECK_IN(!settings_parse(&settings, 2, arguments, &failure), bad[i]);
        CHECK_TEXT(failure.code, CODE_CONFIG);
        CHECK(strstr(failure_message(&failure), bad[i]));
        CHECK_TEXT(settings.socket, DEFAULT_SOCKET);
        failure_clear(&failure);
    }
}

static void check_owned(char *actual, const char *expected)
{
    CHECK_TEXT(actual, expected);
    free(actual);
}

TEST(descriptions_of_mounts)
{
    struct mount_point items[] = {
        {.path = "/a", .label = "/home/ada/x.squashfs", .digest = NULL},
        {.path = "/user-environment", .label = "app/1:v1@demo", .digest = "sha256:aa"},
        {.path = "/tools", .label = "tools", .digest = "sha256:bb"},
    };
    struct mounts mounts = {.items = items, .count = 3};
    check_owned(describe_mounts(&mounts), "/home/ada/x.squashfs:/a,sha256:aa:/user-environment,sha256:bb:/tools");
    check_owned(describe_labels(&mounts), "/home/ada/x.squashfs,app/1:v1@demo,tools");
    check_owned(describe_digests(&mounts), ",sha256:aa,sha256:bb");
    check_owned(describe_views(&mounts, "sha256:bb[t];sha256:aa[default,develop]"), "/tools:tools:t,/user-environment:app:default,/user-environment:app:develop");
    const char *const nothing[] = {"", "sha256:aa[]", "sha256:aa", "sha256:cc[x]", "sha256:aa[x", "[x]", ";;", "sha256:aa]x[", "sha256:aa[", "]", "[", "sha256:aa[,,]"};
    for (size_t i = 0; i < sizeof nothing / sizeof *nothing; i++)
        check_owned(describe_views(&mounts, nothing[i]), "");
    struct mounts none = MOUNTS_NONE;
    check_owned(describe_mounts(&none), "");
}

static void check_report(const char *node, const char *message, const char *hint, const char *expected)
{
    char said[4096] = "";
    struct failure failure = FAILURE_NONE;
    fake_reset(S_CTX_REMOTE);
    fake.log_fd = memfd_create("log", MFD_CLOEXEC);
    failure_set(&failure, "x", hint, "%s", message);
    report_failure(node, &failure);
    failure_clear(&failure);
    CHECK(pread(fake.log_fd, said, sizeof said - 1, 0) >= 0);
    CHECK_TEXT(said, expected);
    close(fake.log_fd);
    fake_reset(S_CTX_REMOTE);
}

TEST(reports)
{
    check_report(NULL, "one", NULL, "uenv: one\n");
    check_report("node1", "one\n  two", "do it", "uenv: node1: one\nuenv:   two\nuenv: hint: do it\n");
    check_report("node1", "one\n", "", "uenv: node1: one\n");
    check_report(NULL, "", NULL, "uenv: \n");
    check_report(NULL, "\x1b[31m%s\t\x7f\xc3\xbc", NULL, "uenv: ?[31m%s??\xc3\xbc\n");
}

TEST(failure_without_memory_is_still_a_failure)
{
    struct failure failure = FAILURE_NONE;
    failure_memory(&failure);
    CHECK(failure.set);
    CHECK_TEXT(failure_message(&failure), "out of memory");
    failure_set(&failure, "a", "b", "%s", "c");
    failure_set(&failure, failure.code, failure.hint, "%s again", failure_message(&failure));
    CHECK_TEXT(failure.message, "c again");
    CHECK_TEXT(failure.hint, "b");
    failure_clear(&failure);
    CHECK(!failure.set);
}
