/* What a step and its task get, and what stops them. */
#include "check.h"
#include "choice.h"
#include "describe.h"
#include "environ.h"
#include "report.h"
#include "spank_fake.h"
#include "step.h"

#include <fcntl.h>
#include <slurm/slurm.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

TEST(step_gets_its_image)
{
    if (!privileged())
        return;
    const struct act *scripts[] = {(const struct act[]){OFFER}};
    start_step();
    fake_setenv("PATH", "/bin");
    fake_setenv(VAR_SPEC, "app/1");
    fake_setenv(VAR_IMAGES, "app/1@sha256:aa:/m");
    fake_setenv(VAR_VIEW, "default");
    prepare("listed", "ready", PREPEND);
    CHECK(ran(step_with(scripts, 1, "app/1", sees_image)));
    CHECK_TEXT(said, "uenv: a note\n");
    CHECK_TEXT(asked(0, "uenv"), "\"app/1@sha256:aa:/m\"");
    CHECK_TEXT(asked(0, "view"), "\"default\"");
    CHECK_TEXT(asked(0, "uid"), "12345");
    CHECK_TEXT(asked(0, "gid"), "12346");
    CHECK_TEXT(asked(0, "groups"), "[12346,12347]");
    CHECK_TEXT(asked(0, "job"), "{\"id\":7,\"step\":0}");
    sees_nothing();
}

TEST(notes_are_shown_by_the_first_node_only)
{
    if (!privileged())
        return;
    const struct act *scripts[] = {(const struct act[]){OFFER}};
    start_step();
    fake_setenv("SLURM_NODEID", "3");
    prepare("listed", "ready", "[]");
    CHECK(ran(step_with(scripts, 1, "app/1", NULL)));
    CHECK_TEXT(said, "");
}

TEST(note_that_was_shown_at_submission_is_not_repeated)
{
    if (!privileged())
        return;
    const struct act *scripts[] = {(const struct act[]){OFFER}};
    struct reply reply;
    struct failure failure = FAILURE_NONE;
    char *shown = NULL;
    static const char text[] = "{\"ok\":true,\"notes\":[\"another\",\"a note\"]}";
    CHECK(reply_parse(&reply, text, strlen(text), &failure, &failure));
    fake.log_fd = -1;
    CHECK(report_notes(NULL, &reply, NULL, &shown));
    reply_free(&reply);
    start_step();
    fake_setenv(VAR_NOTED, shown);
    free(shown);
    prepare("listed", "ready", "[]");
    CHECK(ran(step_with(scripts, 1, "app/1", NULL)));
    CHECK_TEXT(said, "");
}

TEST(what_the_step_is_to_get)
{
    start_bare_step();
    fake_setenv(VAR_SPEC, "app/1");
    fake_setenv(VAR_IMAGES, "pinned");
    check_wish(NULL, "\"pinned\"", NULL);
    check_wish("app/1", "\"pinned\"", NULL);
    check_wish("other", "\"other\"", NULL);
    fake_setenv(VAR_VIEW, "v");
    check_wish("app/1", "\"pinned\"", "\"v\"");
    start_bare_step();
    fake_setenv(VAR_OPTION_UENV, "app/1");
    fake_setenv(VAR_OPTION_VIEW, "w");
    check_wish(NULL, "\"app/1\"", "\"w\"");
    start_bare_step();
    check_wish("app/1", "\"app/1\"", NULL);
    start_bare_step();
    fake_setenv(VAR_SPEC, "app/1");
    check_wish(NULL, "\"app/1\"", NULL);
    start_bare_step();
    fake_setenv(VAR_SPEC, "app/2");
    fake_setenv(VAR_IMAGES, "pinned");
    check_wish("app/1", "\"app/1\"", NULL);
    fake_setenv(VAR_INSTEAD_OF, "app/1");
    check_wish("app/1", "\"pinned\"", NULL);
    start_bare_step();
    fake_setenv(VAR_SPEC, "");
    fake_setenv(VAR_IMAGES, "");
    CHECK(ran(step_with(NULL, 0, NULL, NULL)));
}

static void environment_is_clean(void)
{
    CHECK(!fake_getenv(VAR_MOUNT_LIST) && !fake_getenv(VAR_LOADED_VIEWS) && !fake_getenv(ENV_APPLIED));
}

TEST(none_leaves_no_trace)
{
    start_bare_step();
    fake_setenv(VAR_MOUNT_LIST, "x");
    fake_setenv(VAR_LOADED_VIEWS, "x");
    fake_setenv(ENV_APPLIED, "x");
    CHECK(ran(step_with(NULL, 0, "none", environment_is_clean)));
    start_bare_step();
    fake_setenv(VAR_OPTION_UENV, "none");
    CHECK(ran(step_with(NULL, 0, NULL, NULL)));
    CHECK_TEXT(said, "");
}

TEST(extern_step_and_step_without_option)
{
    start_bare_step();
    fake.step = SLURM_EXTERN_CONT;
    fake_setenv(VAR_IMAGES, "app/1");
    CHECK(ran(step_with(NULL, 0, "app/1", NULL)));
    start_bare_step();
    CHECK(ran(step_with(NULL, 0, NULL, NULL)));
    CHECK(fake_variable_count() == 1);
}

static void check_task_refused(const struct act *script, const char *expected)
{
    const struct act *scripts[] = {script};
    start_step();
    CHECK(refused(step_with(scripts, script ? 1 : 0, "app/1", NULL)));
    CHECK_IN(!strncmp(said, expected, strlen(expected)), said);
}

TEST(errors_end_the_task_with_one_text)
{
    check_task_refused(ANSWER("{\"ok\":false,\"error\":{\"code\":\"x\",\"message\":\"no\\nmore\",\"hint\":\"h\"}}\n"),
                       "uenv: node9: no\nuenv: more\nuenv: hint: h\n");
    check_task_refused(ANSWER("{\"ok\":true}\n"), "uenv: node9: an answer of uenvd is malformed: ");
    check_task_refused(ANSWER("{\"ok\":true,\"lease\":\"l\",\"state\":\"ready\",\"mounts\":[{\"mount\":\"/x\",\"label\":\"a\",\"guard\":\"listed\"}],"
                              "\"env\":[],\"applied\":\"\"}\n"),
                       "uenv: node9: uenvd announced 1 mounts and sent 0\n");
    check_task_refused((const struct act[]){{.kind = ACT_REQUEST}, {.kind = ACT_HOLD}, {.kind = ACT_END}}, "uenv: node9: uenvd does not answer: ");
    start_step();
    fake.task = 1;
    CHECK(refused(step_with((const struct act *[]){ANSWER("x\n")}, 1, "app/1", NULL)));
    CHECK_TEXT(said, "");
}

TEST(errors_of_slurm_end_the_task)
{
    static const char *const functions[] = {"spank_get_item", "spank_getenv"};
    for (size_t i = 0; i < 2; i++) {
        for (int from = 0; from < 3; from++) {
            start_step();
            fake.failing = functions[i];
            fake.failing_from = from;
            CHECK(refused(step_with(NULL, 0, "app/1", NULL)));
            CHECK_IN(strstr(said, "uenv: "), said);
        }
    }
    if (!privileged())
        return;
    const struct act *scripts[] = {(const struct act[]){OFFER}};
    start_step();
    fake.failing = "spank_setenv";
    prepare("listed", "ready", PREPEND);
    CHECK(refused(step_with(scripts, 1, "app/1", NULL)));
    CHECK(strstr(said, "cannot change the variable PATH of the task"));
}

TEST(mount_points_are_checked)
{
    if (!privileged())
        return;
    const struct act *scripts[] = {(const struct act[]){OFFER}};
    start_step();
    prepare("owned", "ready", "[]");
    CHECK(refused(step_with(scripts, 1, "app/1", NULL)));
    CHECK(strstr(said, "does not belong to you"));
    start_step();
    prepare("owned", "ready", PREPEND);
    fake_setenv("PATH", "/bin");
    chown(scratch_dir(), 12345, 12345) == 0 && chown(point, 12345, 12345) == 0 ? (void)0 : abort();
    CHECK(ran(step_with(scripts, 1, "app/1", sees_image)));
    start_step();
    prepare("owned", "ready", "[]");
    chmod(scratch_dir(), 0);
    CHECK(refused(step_with(scripts, 1, "app/1", NULL)));
    CHECK(strstr(said, "Permission denied"));
    chmod(scratch_dir(), 0755);
    rmdir(point);
    CHECK(symlink(image, point) == 0);
    start_step();
    mount_fd = (int)syscall(SYS_open_tree, AT_FDCWD, image, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    CHECK(refused(step_with(scripts, 1, "app/1", NULL)));
    CHECK(strstr(said, "a symbolic link leads to"));
    unlink(point);
    start_step();
    mount_fd = (int)syscall(SYS_open_tree, AT_FDCWD, image, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    CHECK(refused(step_with(scripts, 1, "app/1", NULL)));
    CHECK(strstr(said, "does not exist\nuenv: hint: make the directory first"));
    chown(scratch_dir(), 0, 0) == 0 ? (void)0 : abort();
}

TEST(what_is_no_mount_is_refused)
{
    if (!privileged())
        return;
    const struct act *scripts[] = {(const struct act[]){OFFER}};
    start_step();
    prepare("listed", "ready", "[]");
    close(mount_fd);
    mount_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    CHECK(refused(step_with(scripts, 1, "app/1", NULL)));
    CHECK(strstr(said, "cannot mount app/1 at "));
}

/* ---- where the tasks have namespaces of Slurm's making */

static void sees_image_and_left_no_park(void)
{
    sees_image();
    char line[512];
    FILE *table = fopen("/proc/self/mountinfo", "r");
    CHECK(table != NULL);
    while (fgets(line, sizeof line, table))
        CHECK_IN(!strstr(line, " - tmpfs uenvd "), line);
    fclose(table);
}

TEST(each_task_attaches_where_slurm_changes_its_namespace)
{
    if (!privileged())
        return;
    const struct act *scripts[] = {(const struct act[]){OFFER}};
    static char tmpfs[] = "job_container/tmpfs", none[] = "job_container/none";
    char *const kinds[] = {tmpfs, none, NULL};
    for (size_t i = 0; i < 3; i++) {
        start_step();
        fake_setenv("PATH", "/bin");
        prepare("listed", "ready", PREPEND);
        fake_namespace_plugin(kinds[i]);
        CHECK(ran(step_with(scripts, 1, "app/1", sees_image_and_left_no_park)));
        sees_nothing();
    }
    start_step();
    prepare("owned", "ready", PREPEND);
    fake_namespace_plugin(tmpfs);
    CHECK(refused(step_with(scripts, 1, "app/1", NULL)));
    CHECK(strstr(said, "does not belong to you"));
    start_step();
    prepare("listed", "ready", "[]");
    close(mount_fd);
    mount_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    CHECK(refused(step_with(scripts, 1, "app/1", NULL)));
    CHECK_IN(strstr(said, "cannot keep the mounts for the tasks"), said);
    fake_namespace_plugin(NULL);
}
