/*
 * The hooks as slurmstepd calls them, each step in a child process of its own: it gets a mount namespace, and a task may end in
 * _exit(). The mounts are real (needs root).
 */
#ifndef UENVD_STEP_H
#define UENVD_STEP_H

#include "fake_daemon.h"

#include <slurm/spank.h>
#include <stdbool.h>

int slurm_spank_init(spank_t spank, int argc, char *argv[]);
int slurm_spank_init_post_opt(spank_t spank, int argc, char *argv[]);
int slurm_spank_task_init_privileged(spank_t spank, int argc, char *argv[]);
int slurm_spank_task_init(spank_t spank, int argc, char *argv[]);
int slurm_spank_exit(spank_t spank, int argc, char *argv[]);

#define RAN 42 /* how a task that was allowed to run ends */

extern struct fake_daemon daemon_;
extern char said[8192], image[64], point[64], answer[4096];
extern int mount_fd;

/* Scripts of the daemon: it offers what `prepare` has prepared; it answers with a text. */
#define OFFER                                                                                                                     \
    {.kind = ACT_REQUEST}, {.kind = ACT_SEND, .text = answer, .fds = &mount_fd, .count = 1}, {.kind = ACT_HOLD}, { .kind = ACT_END }
#define ANSWER(text_) ((const struct act[]){{.kind = ACT_REQUEST}, {.kind = ACT_SEND, .text = text_}, {.kind = ACT_END}})
/* Changes of the environment that a view makes. */
#define PREPEND "[[\"prepend\",\"PATH\",[\"/m/bin\"]]]"

/* Whether mounts can be made; if not, the test is skipped. */
bool privileged(void);
/* A directory with a file as the image, an empty one to mount it at, and the answer that offers it. */
void prepare(const char *guard, const char *state, const char *env);
/* Run one step with one task; `check` runs in the task. Returns its wait status; what it printed is in `said`. */
int step_with(const struct act *const *scripts, int count, const char *option, void (*check)(void));
bool ran(int status);
bool refused(int status);
void start_bare_step(void);
/* As srun and sbatch leave it after `--uenv=app/1`. */
void start_step(void);
/* What a task finds that has its image, or has it not. */
void sees_image(void);
void sees_nothing(void);
/* A field of a request that the daemon got, as JSON; NULL if it is not there. */
const char *asked(int number, const char *key);
/* Which images and view are asked for, given the job's variables. */
void check_wish(const char *option, const char *uenv, const char *view);

#endif
