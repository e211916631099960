/* Common to srun, sbatch and salloc: what the labels mean is settled before anything is submitted. */
#ifndef UENVD_SUBMIT_H
#define UENVD_SUBMIT_H

#include "contexts.h"

/* Each has its own input variables: SLURM_UENV, SBATCH_UENV, SALLOC_UENV. */
enum program { PROGRAM_SRUN, PROGRAM_SBATCH, PROGRAM_SALLOC };

/*
 * Resolve what was asked for, or what a session or job passes on, and leave it in this process's environment for the job (choice.h). True: go
 * on, also when nothing was asked for. False: refused, the user has been told.
 *
 * Slurm calls this once for each component of a heterogeneous job, and keeps one value of an option for all of them: from the
 * second call on a component may only repeat what the first settled.
 */
bool submit_resolve(const struct plugin *plugin, struct choice *choice, enum program program);

/* Forget what has been settled; when the process leaves Slurm's plugins. */
void submit_forget(void);

/* Whether it was left to the job's first node (login=optional). */
bool submit_is_unresolved(void);

/* Export what a description list turned out to mean. */
bool submit_export_images(const char *images, struct failure *failure);

#endif
