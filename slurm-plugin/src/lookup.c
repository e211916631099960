#include "lookup.h"

#include "choice.h"
#include "clock.h"
#include "report.h"
#include "spank_wrap.h"
#include "submit.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* A step's start and uenvd's answer; the node may be busy starting others. */
#define LOOKUP_MS 15000
#define KILL_AFTER_MS 1000
#define REAP_MS 10
#define PRINT "/usr/bin/printenv"
#define LOOKUP_SETTING VAR_LOOKUP "=1"
#define HINT_LOOKUP "the job's first node could not be asked; see uenvd's docs/slurm.md, login=optional"
#define MAX_SAID_BYTES ((size_t)1024 * 1024)

struct capture {
    int fd;
    char *text;
    size_t used;
};

struct helper {
    pid_t pid;
    struct capture out, err;
};

static bool starts_with(const char *text, const char *prefix)
{
    return !strncmp(text, prefix, strlen(prefix));
}

char **lookup_environment(char *const *environment)
{
    size_t count = 0, used = 0;
    while (environment[count])
        count++;
    char **kept = calloc(count + 2, sizeof *kept);
    if (!kept)
        return NULL;
    for (size_t i = 0; i < count; i++) {
        const char *setting = environment[i];
        bool own = starts_with(setting, "SLURM_UENVD_") || starts_with(setting, "SLURM_CONF=") || starts_with(setting, "SLURM_JWT=");
        if (own || !(starts_with(setting, "SLURM_") || starts_with(setting, "_SLURM_") || starts_with(setting, "SRUN_")))
            kept[used++] = environment[i];
    }
    kept[used] = (char *)LOOKUP_SETTING;
    return kept;
}

/* ---- the helper's life */

static bool spawn(uint32_t job, int out, int err, pid_t *pid, struct failure *failure)
{
    char program[4096], job_option[32];
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    if (length <= 0)
        return failure_set(failure, CODE_INTERNAL, NULL, "cannot find srun: %s", strerror(errno));
    program[length] = '\0';
    snprintf(job_option, sizeof job_option, "--jobid=%lu", (unsigned long)job);
    char *arguments[] = {"srun", job_option, "--overlap", "--relative=0", "--nodes=1", "--ntasks=1", "--cpus-per-task=1",
                         "--mem=0", "--gres=none", "--quiet", "--input=none", "--export=ALL", "--chdir=/", PRINT, VAR_IMAGES, NULL};
    char **environment = lookup_environment(environ);
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    sigset_t none, standard;
    if (!environment)
        return failure_memory(failure);
    sigemptyset(&none);
    sigfillset(&standard);
    posix_spawn_file_actions_init(&files);
    posix_spawnattr_init(&attributes);
    posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&files, out, STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&files, err, STDERR_FILENO);
    /* srun blocks signals here, and the helper must not inherit that: Ctrl-C ends it, and thereby this wait. */
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &standard);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    int error = posix_spawn(pid, program, &files, &attributes, arguments, environment);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&files);
    free(environment);
    return !error || failure_set(failure, CODE_INTERNAL, NULL, "cannot start %s: %s", program, strerror(error));
}

/* Read once; at the end, or when there is too much, the descriptor is closed. */
static bool read_some(struct capture *capture)
{
    char *grown = realloc(capture->text, capture->used + 4097);
    if (!grown)
        return false;
    capture->text = grown;
    ssize_t got = read(capture->fd, grown + capture->used, 4096);
    if (got > 0)
        capture->used += (size_t)got;
    grown[capture->used] = '\0';
    if (got == 0 || (got < 0 && errno != EINTR) || capture->used > MAX_SAID_BYTES) {
        close(capture->fd);
        capture->fd = -1;
    }
    return true;
}

static bool read_all(struct helper *helper, int64_t deadline_ms, struct failure *failure)
{
    while (helper->out.fd >= 0 || helper->err.fd >= 0) {
        struct pollfd entries[] = {{.fd = helper->out.fd, .events = POLLIN}, {.fd = helper->err.fd, .events = POLLIN}};
        int64_t left_ms = deadline_ms - clock_ms();
        if (left_ms <= 0)
            return failure_set(failure, CODE_TIMEOUT, HINT_LOOKUP, "the job's first node has not answered for %d s", LOOKUP_MS / 1000);
        if (poll(entries, 2, (int)left_ms) <= 0)
            continue;
        if ((entries[0].revents && !read_some(&helper->out)) || (entries[1].revents && !read_some(&helper->err)))
            return failure_memory(failure);
    }
    return true;
}

/* Wait until it has ended, with force if need be. */
static int reap(pid_t pid, bool force)
{
    int status = 0;
    int64_t kill_at_ms = clock_ms() + KILL_AFTER_MS;
    if (force)
        kill(pid, SIGTERM);
    for (;;) {
        pid_t got = waitpid(pid, &status, WNOHANG);
        if (got == pid)
            return status;
        if (got < 0 && errno != EINTR)
            return -1;
        if (clock_ms() >= kill_at_ms)
            kill(pid, SIGKILL);
        poll(NULL, 0, REAP_MS);
    }
}

/* ---- its answer */

/* Pass on what the node's plugin said (its lines begin with "uenv: "), or else the last line of srun. */
static bool explain(char *said, struct failure *failure)
{
    bool told = false;
    const char *last = "srun said nothing";
    for (char *rest = said, *line; rest && (line = strsep(&rest, "\n"));) {
        if (starts_with(line, "uenv: ")) {
            report_text(NULL, line + strlen("uenv: "));
            told = true;
        } else if (*line) {
            last = line;
        }
    }
    if (told)
        return failure_set(failure, CODE_INTERNAL, NULL, "nothing is run");
    return failure_set(failure, CODE_INTERNAL, HINT_LOOKUP, "what the labels mean could not be found out on the job's first node: %s", last);
}

static bool take_answer(struct helper *helper, int status, struct failure *failure)
{
    char *images = helper->out.text;
    if (images)
        images[strcspn(images, "\n")] = '\0';
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0 || !images || !*images)
        return explain(helper->err.text, failure);
    return submit_export_images(images, failure);
}

bool lookup_on_first_node(uint32_t job, struct failure *failure)
{
    int out[2], err[2];
    if (pipe2(out, O_CLOEXEC) < 0)
        return failure_set(failure, CODE_INTERNAL, NULL, "pipe: %s", strerror(errno));
    if (pipe2(err, O_CLOEXEC) < 0) {
        failure_set(failure, CODE_INTERNAL, NULL, "pipe: %s", strerror(errno));
        close(out[0]);
        close(out[1]);
        return false;
    }
    struct helper helper = {.out = {.fd = out[0]}, .err = {.fd = err[0]}};
    bool fine = spawn(job, out[1], err[1], &helper.pid, failure);
    close(out[1]);
    close(err[1]);
    if (fine) {
        fine = read_all(&helper, clock_ms() + LOOKUP_MS, failure);
        int status = reap(helper.pid, !fine);
        fine = fine && take_answer(&helper, status, failure);
    }
    if (helper.out.fd >= 0)
        close(helper.out.fd);
    if (helper.err.fd >= 0)
        close(helper.err.fd);
    free(helper.out.text);
    free(helper.err.text);
    return fine;
}
