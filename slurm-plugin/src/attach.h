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

#endif
