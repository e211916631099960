/*
 * slurmstepd: the step's mount namespace as root in init_post_opt, the environment and the waiting as the user in task_init.
 *
 * The phases differ in what scancel can do: init_post_opt ignores it, so nothing there waits for bytes; a task in task_init
 * dies of SIGTERM like any other. The connection over which the mounts came stays open as long as slurmstepd lives: it is the lease.
 */
#include "attach.h"
#include "clock.h"
#include "contexts.h"
#include "describe.h"
#include "environ.h"
#include "exchange.h"
#include "report.h"
#include "spank_wrap.h"
#include "wish.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define FIRST_PROGRESS_MS 1000
#define NEXT_PROGRESS_MS 5000
/* A waiting task connects while it is still root, so that a step of many tasks is not stopped by uenvd's limit of connections
 * per user. A daemon that is stopped must not hold up the start of the tasks: task_init then tries again. */
#define EARLY_CONNECT_MS 200
/* With srun -K the first task that ends ends the step, and what slurmstepd has not yet passed on is lost: the reason, one time in eight
 * (measured, Slurm 22.05). So none ends at once. */
#define FLUSH_MS 100

static struct {
    enum { STEP_PLAIN, STEP_WITHOUT, STEP_LOOKUP, STEP_WITH } mode;
    struct failure failure;  /* kept for task_init */
    struct client lease;
    struct client waiter;    /* of one task */
    int park;                /* the namespace from which the tasks take the mounts; -1: they are in the step's already */
    struct job_user user;
    struct mounts mounts;
    struct env_ops ops;      /* empty while the state is waiting */
    struct reply answer;     /* to mount: its notes */
} step = {
    .lease = CLIENT_CLOSED,
    .waiter = CLIENT_CLOSED,
    .park = -1,
};

/* ---- init_post_opt */

/* All nodes of a step must mean the same image by a label; those of the first node are told (lookup.h), as is a batch script's node. */
static bool resolve_here(const struct plugin *plugin, spank_t spank, enum step_kind kind, struct request request, struct wish *wish,
                         struct failure *failure)
{
    uint32_t nodes;
    if (kind == STEP_ORDINARY && !wish->lookup && !wish_is_pinned(wish->uenv) && (!sw_nodes(spank, &nodes) || nodes > 1))
        return failure_set(failure, CODE_USAGE, "uenvd_spank.so must be in plugstack.conf also where srun is started; or name digests",
                           "srun did not find out what '%s' means, and the nodes of a step may not each decide for themselves",
                           wish->uenv);
    struct reply reply = REPLY_NONE;
    const char *images;
    struct patience patience = {.total_ms = plugin->settings.timeout_ms};
    request.op = "resolve";
    if (!exchange(&step.lease, &plugin->settings, &request, patience, NULL, NULL, &reply, failure))
        return false;
    bool fine = reply_resolved(&reply, &images, failure);
    if (fine && (!sw_setenv(spank, VAR_SPEC, wish->uenv) || !sw_setenv(spank, VAR_IMAGES, images)))
        fine = failure_set(failure, CODE_INTERNAL, NULL, "cannot change the environment of the step");
    char *copy = fine ? strdup(images) : NULL;
    reply_free(&reply);
    if (!copy)
        return fine ? failure_memory(failure) : false;
    free(wish->uenv);
    wish->uenv = copy;
    wish->resolved = true;
    return true;
}

static bool tasks_change_namespace(const struct plugin *plugin)
{
    enum namespace_owner owner = plugin->settings.namespace_owner;
    return owner == NAMESPACE_AUTO ? sw_tasks_change_namespace() : owner == NAMESPACE_TASK;
}

static bool attach_images(const struct plugin *plugin, struct failure *failure)
{
    size_t fd_count;
    int *fds = client_take_fds(&step.lease, &fd_count);
    bool fine;
    if (fd_count != step.mounts.count)
        fine = failure_set(failure, CODE_PROTOCOL, HINT_PROTOCOL, "uenvd announced %zu mounts and sent %zu", step.mounts.count,
                           fd_count);
    else if (tasks_change_namespace(plugin))
        fine = (step.park = attach_park(fds, fd_count, failure)) >= 0;
    else
        fine = attach_all(&step.mounts, fds, &step.user, failure);
    close_fds(fds, fd_count);
    return fine;
}

static bool mount_images(const struct plugin *plugin, spank_t spank, enum step_kind kind, struct wish *wish, uint32_t job,
                         uint32_t number, struct failure *failure)
{
    gid_t *groups;
    if (!sw_user(spank, &step.user.uid, &step.user.gid, &groups, &step.user.group_count))
        return failure_set(failure, CODE_INTERNAL, NULL, "Slurm does not say whose job this is");
    step.user.groups = groups;
    struct request request = REQUEST_EMPTY;
    request.uenv = wish->uenv;
    request.view = wish->view;
    request.cwd = wish->directory;
    request.uid = step.user.uid;
    request.gid = step.user.gid;
    request.groups = step.user.groups;
    request.group_count = (size_t)step.user.group_count;
    request.job = job;
    request.step = number;
    if (!wish->resolved && !resolve_here(plugin, spank, kind, request, wish, failure))
        return false;
    if (wish->lookup)
        return true;
    request.op = "mount";
    request.uenv = wish->uenv;
    struct patience patience = {.total_ms = plugin->settings.timeout_ms};
    return exchange(&step.lease, &plugin->settings, &request, patience, NULL, NULL, &step.answer, failure) &&
           reply_mounts(&step.answer, &step.mounts, failure) &&
           (step.mounts.waiting || reply_env_ops(&step.answer, &step.ops, failure)) && attach_images(plugin, failure);
}

void remote_init_post_opt(const struct plugin *plugin, const struct choice *choice, spank_t spank)
{
    uint32_t job, number;
    enum step_kind kind;
    if (!sw_step(spank, &job, &number, &kind)) {
        if (choice->uenv.text) {
            step.mode = STEP_WITH;
            failure_set(&step.failure, CODE_INTERNAL, NULL, "Slurm does not say which job step this is");
        }
        return;
    }
    if (kind == STEP_EXTERN)
        return;
    struct wish wish = WISH_NONE;
    bool known = wish_find(spank, choice, &wish);
    if (known && !wish.uenv)
        step.mode = STEP_PLAIN;
    else if (known && !strcmp(wish.uenv, SPEC_NONE))
        step.mode = STEP_WITHOUT;
    else
        step.mode = wish.lookup ? STEP_LOOKUP : STEP_WITH;
    if (step.mode == STEP_WITH || step.mode == STEP_LOOKUP) {
        if (!known)
            failure_set(&step.failure, CODE_INTERNAL, NULL, "the environment of the job cannot be read");
        else if (plugin->config.set)
            failure_set(&step.failure, CODE_CONFIG, plugin->config.hint, "%s", failure_message(&plugin->config));
        else
            mount_images(plugin, spank, kind, &wish, job, number, &step.failure);
    }
    wish_free(&wish);
    if (step.failure.set)
        sw_debug(failure_message(&step.failure));
    if (step.failure.set || step.mode == STEP_LOOKUP)
        client_close(&step.lease); /* no lease for a step that will not run */
}

void remote_task_init_privileged(const struct plugin *plugin)
{
    if (step.mode != STEP_WITH || step.failure.set)
        return;
    if (step.park >= 0 && !attach_parked(step.park, &step.mounts, &step.user, &step.failure))
        return;
    if (!step.mounts.waiting)
        return;
    struct failure ignored = FAILURE_NONE;
    client_connect(&step.waiter, plugin->settings.socket, plugin->settings.peer_uid, clock_ms() + EARLY_CONNECT_MS, &ignored);
    failure_clear(&ignored);
}

/* ---- task_init */

struct progress_lines {
    const char *node; /* NULL: this task prints none */
    int64_t start_ms;
    int64_t last_ms; /* 0: none printed */
};

static void print_progress(void *context, const struct progress *progress)
{
    struct progress_lines *lines = context;
    int64_t now_ms = clock_ms();
    if (!lines->node || now_ms - lines->start_ms < FIRST_PROGRESS_MS ||
        (lines->last_ms && now_ms - lines->last_ms < NEXT_PROGRESS_MS))
        return;
    lines->last_ms = now_ms;
    char *text = NULL;
    int length = *progress->message ? asprintf(&text, "%s", progress->message)
                 : progress->total_bytes > 0 && progress->done_bytes >= 0
                     ? asprintf(&text, "waiting for the image: %lld of %lld MB", (long long)progress->done_bytes / 1000000,
                                (long long)progress->total_bytes / 1000000)
                     : asprintf(&text, "waiting for the image");
    if (length < 0)
        return;
    report_text(lines->node, text);
    free(text);
}

/*
 * While a task waits, the signals that end it must. slurmstepd blocks some of them and handles others; and Slurm's proctrack/linuxproc
 * signals no process whose name is "slurmstepd", not even with SIGKILL (_kill_proclist), which a task is until it execs.
 */
#define WAITING_NAME "uenv-wait"
static const int ending_signals[] = {SIGTERM, SIGINT, SIGHUP, SIGQUIT};
#define ENDING_COUNT (sizeof ending_signals / sizeof *ending_signals)

struct before_waiting {
    sigset_t mask;
    struct sigaction actions[ENDING_COUNT];
    char name[16]; /* TASK_COMM_LEN, include/linux/sched.h */
};

static void become_killable(struct before_waiting *saved)
{
    struct sigaction standard = {.sa_handler = SIG_DFL};
    sigset_t ending;
    if (prctl(PR_GET_NAME, saved->name) < 0)
        saved->name[0] = '\0';
    prctl(PR_SET_NAME, WAITING_NAME);
    sigemptyset(&ending);
    for (size_t i = 0; i < ENDING_COUNT; i++) {
        sigaction(ending_signals[i], &standard, &saved->actions[i]);
        sigaddset(&ending, ending_signals[i]);
    }
    pthread_sigmask(SIG_UNBLOCK, &ending, &saved->mask);
}

static void become_task_again(const struct before_waiting *saved)
{
    pthread_sigmask(SIG_SETMASK, &saved->mask, NULL);
    for (size_t i = 0; i < ENDING_COUNT; i++)
        sigaction(ending_signals[i], &saved->actions[i], NULL);
    if (saved->name[0])
        prctl(PR_SET_NAME, saved->name);
}

static bool wait_for_bytes(const struct plugin *plugin, const char *node, struct failure *failure)
{
    struct request request = REQUEST_EMPTY;
    request.op = "wait";
    request.lease = step.mounts.lease;
    struct progress_lines lines = {.node = node, .start_ms = clock_ms()};
    struct patience patience = {.silence_ms = plugin->settings.silence_ms};
    struct reply reply = REPLY_NONE;
    struct before_waiting saved;
    become_killable(&saved);
    bool fine = exchange(&step.waiter, &plugin->settings, &request, patience, print_progress, &lines, &reply, failure) &&
                reply_env_ops(&reply, &step.ops, failure);
    become_task_again(&saved);
    if (fine && node)
        report_notes(node, &reply, NULL, NULL);
    reply_free(&reply);
    client_close(&step.waiter);
    return fine;
}

static bool set_description(spank_t spank, const char *name, char *text)
{
    if (!text)
        return false;
    /* Longer than any program could get: better none than a stale one. */
    bool fits = strlen(name) + 1 + strlen(text) <= MAX_ENV_STRING_BYTES;
    bool fine = fits ? sw_setenv(spank, name, text) : sw_unsetenv(spank, name);
    free(text);
    return fine;
}

static bool describe(spank_t spank)
{
    return set_description(spank, VAR_MOUNT_LIST, describe_mounts(&step.mounts)) &&
           set_description(spank, VAR_LABEL, describe_labels(&step.mounts)) &&
           set_description(spank, VAR_DIGEST, describe_digests(&step.mounts)) &&
           set_description(spank, VAR_LOADED_VIEWS, describe_views(&step.mounts, step.ops.applied));
}

static void describe_nothing(spank_t spank)
{
    static const char *const names[] = {VAR_MOUNT_LIST, VAR_LABEL, VAR_DIGEST, VAR_LOADED_VIEWS, ENV_APPLIED, ENV_RESTORE};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        sw_unsetenv(spank, names[i]);
}

/* What the user was told at submission need not be said again. */
static void report_unseen_notes(spank_t spank)
{
    bool ok;
    char *seen = sw_getenv(spank, VAR_NOTED, &ok);
    report_notes(NULL, &step.answer, seen, NULL);
    free(seen);
}

static bool prepare_task(const struct plugin *plugin, spank_t spank, const char *node, bool speaks, bool first_node,
                         struct failure *failure)
{
    if (speaks && first_node)
        report_unseen_notes(spank);
    if (step.mounts.waiting && !wait_for_bytes(plugin, speaks ? node : NULL, failure))
        return false;
    struct env_access access = sw_environ(spank);
    if (!environ_apply(&step.ops, &access, failure))
        return false;
    return describe(spank) || failure_set(failure, CODE_INTERNAL, NULL, "cannot change the environment of the task");
}

static char *node_name(spank_t spank)
{
    bool ok;
    char *name = sw_getenv(spank, "SLURMD_NODENAME", &ok);
    char host[256] = "this node";
    if (!name && gethostname(host, sizeof host) == 0)
        host[sizeof host - 1] = '\0';
    return name ? name : strdup(host);
}

void remote_task_init(const struct plugin *plugin, spank_t spank)
{
    if (step.mode == STEP_WITHOUT)
        describe_nothing(spank);
    if (step.mode != STEP_WITH && step.mode != STEP_LOOKUP)
        return;
    bool ok;
    int task = 0;
    bool speaks = !sw_local_task(spank, &task) || task == 0;
    char *node = node_name(spank), *node_number = sw_getenv(spank, "SLURM_NODEID", &ok);
    bool first_node = !node_number || !strcmp(node_number, "0");
    if (step.failure.set ||
        (step.mode == STEP_WITH && !prepare_task(plugin, spank, node, speaks, first_node, &step.failure))) {
        if (speaks)
            report_failure(node, &step.failure);
        poll(NULL, 0, FLUSH_MS);
        _exit(1); /* a task must not run without what was asked for; returning -1 would add two lines per task */
    }
    free(node);
    free(node_number);
}

void remote_exit(void)
{
    client_close(&step.lease);
    if (step.park >= 0)
        close(step.park);
    step.park = -1;
    mounts_free(&step.mounts);
    env_ops_free(&step.ops);
    reply_free(&step.answer);
    failure_clear(&step.failure);
    step.mode = STEP_PLAIN;
}
