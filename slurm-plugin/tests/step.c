#include "step.h"

#include "check.h"
#include "choice.h"
#include "describe.h"
#include "environ.h"
#include "spank_fake.h"

#include <fcntl.h>
#include <json-c/json.h>
#include <sanitizer/lsan_interface.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

struct fake_daemon daemon_;
char said[8192], image[64], point[64], answer[4096];
int mount_fd = -1;

bool privileged(void)
{
    if (geteuid() == 0)
        return true;
    test_skip("needs root, for mount namespaces");
    return false;
}

void prepare(const char *guard, const char *state, const char *env)
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

int step_with(const struct act *const *scripts, int count, const char *option, void (*check)(void))
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

bool ran(int status)
{
    return WIFEXITED(status) && WEXITSTATUS(status) == RAN;
}

bool refused(int status)
{
    return WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

void start_bare_step(void)
{
    fake_reset(S_CTX_REMOTE);
    fake.uid = 12345;
    fake.gid = 12346;
    fake.groups[0] = 12346;
    fake.groups[1] = 12347;
    fake.group_count = 2;
    fake_setenv("SLURMD_NODENAME", "node9");
}

void start_step(void)
{
    start_bare_step();
    fake_setenv(VAR_SPEC, "app/1");
    fake_setenv(VAR_IMAGES, "app/1@sha256:aa:/m");
}

void sees_image(void)
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

void sees_nothing(void)
{
    char path[128];
    snprintf(path, sizeof path, "%s/hello", point);
    CHECK(access(path, F_OK) < 0);
}

const char *asked(int number, const char *key)
{
    static char text[1024];
    struct json_object *frame = json_tokener_parse(daemon_.requests[number]), *value;
    bool found = frame && json_object_object_get_ex(frame, key, &value);
    if (found)
        snprintf(text, sizeof text, "%s", json_object_to_json_string_ext(value, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
    json_object_put(frame);
    return found ? text : NULL;
}

void check_wish(const char *option, const char *uenv, const char *view)
{
    const struct act *scripts[] = {(const struct act[]){{.kind = ACT_REQUEST}, {.kind = ACT_END}}};
    CHECK(refused(step_with(scripts, 1, option, NULL)));
    CHECK_TEXT(asked(0, "uenv"), uenv);
    CHECK_TEXT(asked(0, "view"), view);
}
