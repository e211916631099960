/* Tasks that wait for the bytes of their image. */
#include "check.h"
#include "spank_fake.h"
#include "step.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

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
