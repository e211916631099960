/*
 * Where no uenvd runs on the submitting node (login=optional): the job's first node finds out what the labels mean, before the tasks are
 * launched, so that all nodes of the step get the same. It is asked by a step of one task, `srun --overlap --relative=0`, whose plugin only
 * resolves (VAR_LOOKUP) and leaves the answer in the task's environment; the task prints it.
 */
#ifndef UENVD_LOOKUP_H
#define UENVD_LOOKUP_H

#include "failure.h"

#include <stdbool.h>
#include <stdint.h>

/* Ask, and export the answer (choice.h). Ends by a deadline. False: it cannot be known; what the node said has been printed. */
bool lookup_on_first_node(uint32_t job, struct failure *failure);

/* The environment of the helper: without what would change what it does or prints. To be freed (the array only); NULL without memory. */
char **lookup_environment(char *const *environment);

#endif
