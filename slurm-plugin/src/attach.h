/* The step's own mount namespace, and the mounts from uenvd in it. Linux >= 5.6 (openat2). */
#ifndef UENVD_ATTACH_H
#define UENVD_ATTACH_H

#include "failure.h"
#include "proto.h"

#include <sys/types.h>

/* The user whose rights count where he named the mount point himself. */
struct job_user {
    uid_t uid;
    gid_t gid;
    const gid_t *groups;
    int group_count;
};

/*
 * Move this thread (and what it will fork) into a new mount namespace from which no mount propagates to the node, and attach
 * the i-th descriptor at the i-th mount point. Needs root. The descriptors stay the caller's. On failure
 * the namespace may be new and some mounts attached: nothing outside sees either.
 */
bool attach_all(const struct mounts *mounts, const int *fds, const struct job_user *user, struct failure *failure);

/*
 * The same in two halves, for sites where each task enters a namespace of Slurm's making after this process has forked it. The first keeps
 * the mounts in a namespace that nobody is in, and returns it (close-on-exec; it and the mounts end with its last descriptor) or -1.
 * Needs root; leaves this process, all its threads included, in the namespace where it was.
 */
int attach_park(const int *fds, size_t count, struct failure *failure);
/* In the task, single-threaded and still root: give it a namespace of its own in which the parked mounts are attached. */
bool attach_parked(int park, const struct mounts *mounts, const struct job_user *user, struct failure *failure);

#endif
