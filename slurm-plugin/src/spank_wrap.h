/*
 * The seam to libslurm: every call into it is here, with its result checked. The rest of the plugin is linked against a fake
 * libslurm in the unit tests (tests/spank_fake.c).
 */
#ifndef UENVD_SPANK_WRAP_H
#define UENVD_SPANK_WRAP_H

#include "environ.h"
#include "failure.h"

#include <slurm/spank.h>
#include <stdint.h>
#include <sys/types.h>

/* STEP_SINGLE: a batch script, or the shell of salloc: on the first node only. */
enum step_kind { STEP_ORDINARY, STEP_SINGLE, STEP_EXTERN };

bool sw_register_option(spank_t spank, struct spank_option *option);

/* The number of the job; in srun from local_user_init on. */
bool sw_job(spank_t spank, uint32_t *job);
/* On how many nodes the step runs; in slurmstepd. */
bool sw_nodes(spank_t spank, uint32_t *nodes);
/* Whether Slurm gives each task a mount namespace of the job's own after this plugin could have made the step's (job_container/tmpfs). */
bool sw_tasks_change_namespace(void);

/* The numbers of the job step. */
bool sw_step(spank_t spank, uint32_t *job, uint32_t *step, enum step_kind *kind);
/* The user of the job; `groups` belongs to Slurm. */
bool sw_user(spank_t spank, uid_t *uid, gid_t *gid, gid_t **groups, int *group_count);
/* The task's number on this node, from 0; only in the task callbacks. */
bool sw_local_task(spank_t spank, int *task);

/* The environment of the job or task: a copy (to be freed) or NULL; `*ok` false: it could not be read. */
char *sw_getenv(spank_t spank, const char *name, bool *ok);
bool sw_setenv(spank_t spank, const char *name, const char *value);
bool sw_unsetenv(spank_t spank, const char *name);
struct env_access sw_environ(spank_t spank);

/* Print a line on the user's terminal (or the output of his batch job), without any prefix of Slurm's. */
void sw_print(const char *line);
/* Write a line to the daemon's log; on a terminal only with srun -v. */
void sw_debug(const char *line);

#endif
