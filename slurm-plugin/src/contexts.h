/* What the plugin does in each context of Slurm; one file per context. */
#ifndef UENVD_CONTEXTS_H
#define UENVD_CONTEXTS_H

#include "args.h"
#include "choice.h"
#include "failure.h"

#include <slurm/spank.h>

/* State of the plugin in this process. */
struct plugin {
    struct settings settings;
    struct failure config; /* a wrong plugstack.conf; told only to who uses the options */
};

/* srun: resolve, or refuse (-1: nothing is submitted). */
int local_init_post_opt(const struct plugin *plugin, struct choice *choice);
/* srun, when it has its nodes and has not launched the tasks; -1: nothing is run. */
int local_user_init(spank_t spank);

/* sbatch, salloc. */
int allocator_init_post_opt(const struct plugin *plugin, struct choice *choice);

/*
 * slurmstepd. No callback reports an error to Slurm: for one of init_post_opt it would end srun with status 0 and drain the node. A
 * failure is kept until task_init, which ends the task.
 */
void remote_init_post_opt(const struct plugin *plugin, const struct choice *choice, spank_t spank);
void remote_task_init_privileged(const struct plugin *plugin);
void remote_task_init(const struct plugin *plugin, spank_t spank);
void remote_exit(void);

#endif
