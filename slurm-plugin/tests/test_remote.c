/*
 * The hooks as slurmstepd calls them, each step in a child process of its own: it gets a mount namespace, and a task may end in
 * _exit(). The mounts are real (needs root).
 */
#include "check.h"
#include "choice.h"
#include "describe.h"
#include "environ.h"
#include "fake_daemon.h"
#include "report.h"
#include "spank_fake.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <sanitizer/lsan_interface.h>
#include <signal.h>
#include <slurm/slurm.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

int slurm_spank_init(spank_t spank, int argc, char *argv[]);
int slurm_spank_init_post_opt(spank_t spank, int argc, char *argv[]);
int slurm_spank_task_init_privileged(spank_t spank, int argc, char *argv[]);
int slurm_spank_task_init(spank_t spank, int argc, char *argv[]);
int slurm_spank_exit(spank_t spank, int argc, char *argv[]);

#define RAN 42 /* how a task that was allowed to run ends */

static struct fake_daemon daemon_;
static char said[8192], image[64], point[64], answer[4096];
static int mount_fd = -1;

static bool privileged(void)
{
    if (geteuid() == 0)
        return true;
    test_skip("needs root, for mount namespaces");
    return false;
}

/* A directory with a file as the image, an empty one to mount it at, and the answer that offers it. */
static void prepare(const char *guard, const char *state, const char *env)
{
    char path[128];
    snprintf(image, sizeof image, "%s/image", scratch_dir());
    snprintf(point, sizeof point, "%s/point", scratch_dir());
    chmod(scratch_dir(), 0755);
    mkdir(image, 0755);
    mkdir(point, 0755);
    snprintf(path, sizeof path, "%s/hello", image);
    close(open(path, O_CREAT | O_WRONLY, 0644));
    mount_fd = (int)syscall(SYS_open_tree, AT_FDCWD, image, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    CHECK(mount_fd >= 0);
    snprintf(answer, sizeof answer,
             "{\"ok\":true,\"lease\":\"l\",\"state\":\"%s\",\"mounts\":[{\"mount\":\"%s\",\"digest\":\"sha256:aa\",\"label\":\"app/1\","
             "\"guard\":\"%s\"}],\"env\":%s,\"applied\":\"sha256:aa[default]\",\"notes\":[\"a note\"]}\n",
             state, point, guard, env);
}

#define OFFER                                                                                                                     \
    {.kind = ACT_REQUEST}, {.kind = ACT_SEND, .text = answer, .fds = &mount_fd, .count = 1}, {.kind = ACT_HOLD}, { .kind = ACT_END }

/* Run one step with one task; `check` runs in the task. Returns its wait status; what it printed is in `said`. */
static int step_with(const struct act *const *scripts, int count, const char *option, void (*check)(void))
{
    static char socket_argument[200];
    daemon_listen(&daemon_, scripts, count);
    snprintf(socket_argument, sizeof socket_argument, "socket=%s", daemon_.settings.socket);
    static char peer[32];
    snprintf(peer, sizeof peer, "peer_uid=%u", geteuid());
    char *arguments[] = {socket_argument, "timeout_ms=400", "silence_ms=400", peer};
    fake.log_fd = memfd_create("log", MFD_CLOEXEC);
    pid_t child = test_fork();
    if (child == 0) {
        close(daemon_.listener);
        CHECK(slurm_spank_init(NULL, 4, arguments) == 0);
        if (option)
            CHECK(fake_option("uenv", option) == 0);
        CHECK(slurm_spank_init_post_opt(NULL, 4, arguments) == 0);
        CHECK(slurm_spank_task_init_privileged(NULL, 4, arguments) == 0);
        CHECK(slurm_spank_task_init(NULL, 4, arguments) == 0);
        if (check)
            check();
        CHECK(slurm_spank_exit(NULL, 4, arguments) == 0);
#ifdef __SANITIZE_ADDRESS__
        __lsan_do_leak_check(); /* ends the process when slurmstepd would have lost memory */
#endif
        _exit(RAN);
    }
    daemon_serve(&daemon_);
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    daemon_cancel(&daemon_);
    if (mount_fd >= 0)
        close(mount_fd);
    mount_fd = -1;
    ssize_t length = pread(fake.log_fd, said, sizeof said - 1, 0);
    CHECK(length >= 0);
    said[length] = '\0';
    close(fake.log_fd);
    fake.log_fd = -1;
    return status;
}

static bool ran(int status)
{
    return WIFEXITED(status) && WEXITSTATUS(status) == RAN;
}

static bool refused(int status)
{
    return WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

static void start_bare_step(void)
{
    fake_reset(S_CTX_REMOTE);
    fake.uid = 12345;
    fake.gid = 12346;
    fake.groups[0] = 12346;
    fake.groups[1] = 12347;
    fake.group_count = 2;
    fake_setenv("SLURMD_NODENAME", "node9");
}

/* As srun and sbatch leave it after `--uenv=app/1`. */
static void start_step(void)
{
    start_bare_step();
    fake_setenv(VAR_SPEC, "app/1");
    fake_setenv(VAR_IMAGES, "app/1@sha256:aa:/m");
}

static void sees_image(void)
{
    char path[128];
    snprintf(path, sizeof path, "%s/hello", point);
    CHECK(access(path, F_OK) == 0);
    CHECK_TEXT(fake_getenv("PATH"), "/m/bin:/bin");
    CHECK_TEXT(fake_getenv(VAR_MOUNT_LIST) ? "set" : NULL, "set");
    CHECK_TEXT(fake_getenv(VAR_LABEL), "app/1");
    CHECK_TEXT(fake_getenv(VAR_DIGEST), "sha256:aa");
    char expected[128];
    snprintf(expected, sizeof expected, "%s:app:default", point);
    CHECK_TEXT(fake_getenv(VAR_LOADED_VIEWS), expected);
}

static void sees_nothing(void)
{
    char path[128];
    snprintf(path, sizeof path, "%s/hello", point);
    CHECK(access(path, F_OK) < 0);
}

static const char *asked(int number, const char *key)
{
    static char text[1024];
    struct json_object *frame = json_tokener_parse(daemon_.requests[number]), *value;
    bool found = frame && json_object_object_get_ex(frame, key, &value);
    if (found)
        snprintf(text, sizeof text, "%s", json_object_to_json_string_ext(value, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
    json_object_put(frame);
    return found ? text : NULL;
}

static const char PREPEND[] = "[[\"prepend\",\"PATH\",[\"/m/bin\"]]]";

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

/* Which images and view are asked for, given the job's variables. */
static void check_wish(const char *option, const char *uenv, const char *view)
{
    const struct act *scripts[] = {(const struct act[]){{.kind = ACT_REQUEST}, {.kind = ACT_END}}};
    CHECK(refused(step_with(scripts, 1, option, NULL)));
    CHECK_TEXT(asked(0, "uenv"), uenv);
    CHECK_TEXT(asked(0, "view"), view);
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

#define ANSWER(text_) ((const struct act[]){{.kind = ACT_REQUEST}, {.kind = ACT_SEND, .text = text_}, {.kind = ACT_END}})

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

/* ---- without uenvd where the job was submitted */

static const char RESOLVED[] = "{\"ok\":true,\"resolved\":\"app/1@sha256:aa:/m\"}\n";

static void knows_what_it_means(void)
{
    CHECK_TEXT(fake_getenv(VAR_IMAGES), "app/1@sha256:aa:/m");
    CHECK_TEXT(fake_getenv(VAR_SPEC), "app/1");
}

TEST(batch_script_is_told_what_its_node_found)
{
    if (!privileged())
        return;
    const struct act *scripts[] = {(const struct act[]){{.kind = ACT_REQUEST}, {.kind = ACT_SEND, .text = RESOLVED}, OFFER}};
    start_bare_step();
    fake.step = SLURM_BATCH_SCRIPT;
    fake.nodes = 4;
    prepare("listed", "ready", "[]");
    CHECK(ran(step_with(scripts, 1, "app/1", knows_what_it_means)));
    CHECK_TEXT(asked(0, "op"), "\"mount\"");
    CHECK_TEXT(asked(0, "uenv"), "\"app/1@sha256:aa:/m\"");
}

TEST(helper_step_only_looks_up)
{
    const struct act *scripts[] = {(const struct act[]){{.kind = ACT_REQUEST}, {.kind = ACT_SEND, .text = RESOLVED}, {.kind = ACT_END}}};
    start_bare_step();
    fake_setenv(VAR_SPEC, "app/1");
    fake_setenv(VAR_VIEW, "default");
    fake_setenv(VAR_LOOKUP, "1");
    CHECK(ran(step_with(scripts, 1, NULL, knows_what_it_means)));
    CHECK_TEXT(asked(0, "op"), "\"resolve\"");
    CHECK_TEXT(asked(0, "view"), "\"default\"");
    CHECK_TEXT(asked(0, "job"), "{\"id\":7,\"step\":0}");
    CHECK_TEXT(said, "");
    const struct act *refusing[] = {ANSWER("{\"ok\":false,\"error\":{\"code\":\"unknown-label\",\"message\":\"no\"}}\n")};
    CHECK(refused(step_with(refusing, 1, NULL, NULL)));
    CHECK_TEXT(said, "uenv: node9: no\n");
}

TEST(nodes_of_a_step_do_not_each_decide)
{
    start_bare_step();
    fake.nodes = 2;
    CHECK(refused(step_with(NULL, 0, "app/1", NULL)));
    CHECK_IN(strstr(said, "the nodes of a step may not each decide for themselves"), said);
    start_bare_step();
    fake.nodes = 2;
    check_wish("app/1@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef,/x.squashfs",
               "\"app/1@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef,/x.squashfs\"", NULL);
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

#define WAITS(text_)                                                                                                              \
    ((const struct act *[]){(const struct act[]){OFFER},                                                                          \
                            (const struct act[]){{.kind = ACT_REQUEST}, {.kind = ACT_SEND, .text = text_}, {.kind = ACT_HOLD}, {.kind = ACT_END}}})

static void keeps_its_name(void)
{
    char name[16];
    CHECK(prctl(PR_GET_NAME, name) == 0);
    CHECK_IN(strcmp(name, "uenv-wait") != 0, name);
    sees_image();
}

TEST(task_waits_for_the_bytes)
{
    if (!privileged())
        return;
    start_step();
    fake_setenv("PATH", "/bin");
    prepare("listed", "waiting", "null");
    CHECK(ran(step_with(WAITS("{\"event\":\"progress\",\"message\":\"m\"}\n{\"ok\":true,\"env\":[[\"prepend\",\"PATH\",[\"/m/bin\"]]],"
                              "\"applied\":\"sha256:aa[default]\"}\n"),
                        2, "app/1", keeps_its_name)));
    CHECK_TEXT(asked(1, "op"), "\"wait\"");
    CHECK_TEXT(asked(1, "lease"), "\"l\"");
}

TEST(waiting_fails)
{
    if (!privileged())
        return;
    static const struct {
        const char *text, *expected;
    } cases[] = {
        {"{\"ok\":false,\"error\":{\"code\":\"digest-mismatch\",\"message\":\"damaged\"}}\n", "uenv: node9: damaged\n"},
        {"{\"ok\":true,\"env\":5}\n", "uenv: node9: an answer of uenvd is malformed"},
        {"{\"event\":\"progress\"}\n", "uenv: node9: uenvd does not answer: nothing came from"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        start_step();
        prepare("listed", "waiting", "null");
        CHECK(refused(step_with(WAITS(cases[i].text), 2, "app/1", NULL)));
        CHECK_IN(strstr(said, cases[i].expected), said);
    }
}

TEST(waiting_task_dies_of_sigterm)
{
    if (!privileged())
        return;
    start_step();
    prepare("listed", "waiting", "null");
    sigset_t blocked, old;
    sigfillset(&blocked);
    /* As in slurmstepd: blocked when the task begins. It is sent before it waits, and delivered once it does. */
    sigprocmask(SIG_BLOCK, &blocked, &old);
    const struct act *const *scripts = WAITS("");
    daemon_listen(&daemon_, scripts, 2);
    static char socket_argument[200];
    snprintf(socket_argument, sizeof socket_argument, "socket=%s", daemon_.settings.socket);
    char *arguments[] = {socket_argument, "silence_ms=5000"};
    pid_t child = test_fork();
    if (child == 0) {
        close(daemon_.listener);
        CHECK(slurm_spank_init(NULL, 2, arguments) == 0);
        CHECK(fake_option("uenv", "app/1") == 0);
        CHECK(slurm_spank_init_post_opt(NULL, 2, arguments) == 0);
        raise(SIGTERM);
        slurm_spank_task_init(NULL, 2, arguments);
        _exit(RAN);
    }
    daemon_serve(&daemon_);
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    sigprocmask(SIG_SETMASK, &old, NULL);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM);
    daemon_cancel(&daemon_);
    close(mount_fd);
    mount_fd = -1;
}
