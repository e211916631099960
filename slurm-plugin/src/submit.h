/* Common to srun, sbatch and salloc: what the labels mean is settled before anything is submitted. */
#ifndef UENVD_SUBMIT_H
#define UENVD_SUBMIT_H

#include "contexts.h"

/*
 * Resolve what was asked for and leave it in this process's environment for the job (choice.h). True: go on, also
 * when nothing was asked for. False: refused, the user has been told.
 */
bool submit_resolve(const struct plugin *plugin, const struct choice *choice);

#endif
