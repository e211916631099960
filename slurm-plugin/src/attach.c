#include "attach.h"

#include "client.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/openat2.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Not in glibc 2.36 (linux/mount.h clashes with sys/mount.h). */
#ifndef MOVE_MOUNT_F_EMPTY_PATH
#define MOVE_MOUNT_F_EMPTY_PATH 0x00000004
#endif
#ifndef MOVE_MOUNT_T_EMPTY_PATH
#define MOVE_MOUNT_T_EMPTY_PATH 0x00000040
#endif

#ifndef OPEN_TREE_CLONE
#define OPEN_TREE_CLONE 1
#endif
#ifndef OPEN_TREE_CLOEXEC
#define OPEN_TREE_CLOEXEC O_CLOEXEC
#endif

#define HINT_MISSING "ask the site's administrators to make this directory on the nodes, or name another one: LABEL:/path"

/*
 * Open a directory without following any symbolic link, so that the one that was checked is the one that is named. A site's mount
 * point can lie inside of an image that the user made: behind a link there, root would mount over the node's own directories.
 */
static int open_directory(const char *path)
{
    struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
}

/*
 * The same with the rights of the user: his groups, then his ids for file access, for this thread only. The kernel takes the
 * capabilities to override file permissions away while fsuid is not 0.
 */
static int open_as_user(const char *path, const struct job_user *user)
{
    gid_t *saved = NULL;
    int saved_count = getgroups(0, NULL);
    if (saved_count < 0)
        return -1;
    saved = calloc((size_t)saved_count + 1, sizeof *saved);
    if (!saved || (saved_count = getgroups(saved_count, saved)) < 0) {
        free(saved);
        return -1;
    }
    int fd = -1, error = EPERM;
    /* glibc's setgroups() would change all threads of slurmstepd. */
    if (syscall(SYS_setgroups, user->group_count, user->groups) == 0) {
        setfsgid(user->gid);
        setfsuid(user->uid);
        if ((uid_t)setfsuid((uid_t)-1) == user->uid && (gid_t)setfsgid((gid_t)-1) == user->gid) {
            fd = open_directory(path);
            error = errno;
        }
        setfsuid(geteuid());
        setfsgid(getegid());
        if (syscall(SYS_setgroups, saved_count, saved) != 0 && fd >= 0) {
            error = errno;
            close(fd);
            fd = -1;
        }
    }
    free(saved);
    errno = error;
    return fd;
}

static bool fail_open(const struct mount_point *mount, struct failure *failure)
{
    switch (errno) {
    case ENOENT:
        return failure_set(failure, CODE_MOUNT_POINT, mount->owned ? "make the directory first" : HINT_MISSING,
                           "the mount point %s of %s does not exist", mount->path, mount->label);
    case ENOTDIR:
        return failure_set(failure, CODE_MOUNT_POINT, NULL, "the mount point %s of %s is not a directory", mount->path,
                           mount->label);
    case ELOOP:
        return failure_set(failure, CODE_MOUNT_POINT, "name the directory itself",
                           "a symbolic link leads to the mount point %s of %s", mount->path, mount->label);
    default:
        return failure_set(failure, CODE_MOUNT_POINT, NULL, "cannot use the mount point %s of %s: %s", mount->path,
                           mount->label, strerror(errno));
    }
}

static bool attach_one(const struct mount_point *mount, int fd, const struct job_user *user, struct failure *failure)
{
    int target = mount->owned ? open_as_user(mount->path, user) : open_directory(mount->path);
    if (target < 0)
        return fail_open(mount, failure);
    struct stat status;
    bool fine = true;
    if (mount->owned && (fstat(target, &status) < 0 || status.st_uid != user->uid))
        fine = failure_set(failure, CODE_MOUNT_POINT, "use a directory of your own, or one that the site lists",
                           "the mount point %s of %s does not belong to you", mount->path, mount->label);
    else if (syscall(SYS_move_mount, fd, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH) < 0)
        fine = failure_set(failure, CODE_MOUNT_FAILED, NULL, "cannot mount %s at %s: %s", mount->label, mount->path,
                           strerror(errno));
    close(target);
    return fine;
}

/* A namespace for this thread and what it forks, from which nothing propagates to the node. */
static bool leave_namespace(struct failure *failure)
{
    if (unshare(CLONE_NEWNS) < 0)
        return failure_set(failure, CODE_MOUNT_FAILED, NULL, "cannot make a mount namespace: %s", strerror(errno));
    /* Where systemd made / shared, a mount would otherwise show up on the node and in every other job. */
    if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0)
        return failure_set(failure, CODE_MOUNT_FAILED, NULL, "cannot make the mount namespace a slave: %s", strerror(errno));
    return true;
}

bool attach_all(const struct mounts *mounts, const int *fds, const struct job_user *user, struct failure *failure)
{
    if (!leave_namespace(failure))
        return false;
    for (size_t i = 0; i < mounts->count; i++)
        if (!attach_one(&mounts->items[i], fds[i], user, failure))
            return false;
    return true;
}

/* ---- parked */

/* In a namespace that is only a car park any directory will do; this one exists everywhere. */
#define PARK "/proc"

struct parking {
    const int *fds;
    size_t count;
    int namespace; /* -1: failed */
    struct failure *failure;
};

static bool park_all(struct parking *parking)
{
    char place[32];
    /* Opened before /proc is covered; it names the thread's new namespace. */
    int own = open("/proc/thread-self/ns/mnt", O_RDONLY | O_CLOEXEC);
    if (own < 0 || mount("uenvd", PARK, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0700,size=64k") < 0)
        goto failed;
    for (size_t i = 0; i < parking->count; i++) {
        snprintf(place, sizeof place, PARK "/%zu", i);
        if (mkdir(place, 0700) < 0 ||
            syscall(SYS_move_mount, parking->fds[i], "", AT_FDCWD, place, MOVE_MOUNT_F_EMPTY_PATH) < 0)
            goto failed;
    }
    parking->namespace = own;
    return true;
failed:
    failure_set(parking->failure, CODE_MOUNT_FAILED, NULL, "cannot keep the mounts for the tasks: %s", strerror(errno));
    if (own >= 0)
        close(own);
    return false;
}

static void *park_in_thread(void *context)
{
    struct parking *parking = context;
    if (leave_namespace(parking->failure))
        park_all(parking);
    return NULL;
}

int attach_park(const int *fds, size_t count, struct failure *failure)
{
    struct parking parking = {fds, count, -1, failure};
    pthread_t thread;
    int error = pthread_create(&thread, NULL, park_in_thread, &parking);
    if (error) {
        failure_set(failure, CODE_MOUNT_FAILED, NULL, "cannot make a thread: %s", strerror(error));
        return -1;
    }
    pthread_join(thread, NULL);
    return parking.namespace;
}

/* Clone the parked mounts; the caller closes and frees. NULL: see errno. */
static int *clone_parked(int park, size_t count)
{
    int *fds = calloc(count + 1, sizeof *fds), own = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC), error = 0;
    if (!fds || own < 0 || setns(park, CLONE_NEWNS) < 0) {
        error = errno;
        free(fds);
        fds = NULL;
    } else {
        for (size_t i = 0; i < count; i++) {
            char place[32];
            snprintf(place, sizeof place, PARK "/%zu", i);
            fds[i] = (int)syscall(SYS_open_tree, AT_FDCWD, place, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
            if (fds[i] < 0 && !error)
                error = errno;
        }
        if (setns(own, CLONE_NEWNS) < 0)
            error = errno;
        if (error) {
            close_fds(fds, count);
            fds = NULL;
        }
    }
    if (own >= 0)
        close(own);
    errno = error;
    return fds;
}

bool attach_parked(int park, const struct mounts *mounts, const struct job_user *user, struct failure *failure)
{
    int *fds = clone_parked(park, mounts->count);
    if (!fds)
        return failure_set(failure, CODE_MOUNT_FAILED, NULL, "cannot take the mounts that were kept for the tasks: %s", strerror(errno));
    bool fine = attach_all(mounts, fds, user, failure);
    close_fds(fds, mounts->count);
    return fine;
}
