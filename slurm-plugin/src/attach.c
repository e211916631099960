#include "attach.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/openat2.h>
#include <sched.h>
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

bool attach_all(const struct mounts *mounts, const int *fds, const struct job_user *user, struct failure *failure)
{
    if (unshare(CLONE_NEWNS) < 0)
        return failure_set(failure, CODE_MOUNT_FAILED, NULL, "cannot make a mount namespace: %s", strerror(errno));
    /* Where systemd made / shared, a mount would otherwise show up on the node and in every other job. */
    if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0)
        return failure_set(failure, CODE_MOUNT_FAILED, NULL, "cannot make the mount namespace a slave: %s", strerror(errno));
    for (size_t i = 0; i < mounts->count; i++)
        if (!attach_one(&mounts->items[i], fds[i], user, failure))
            return false;
    return true;
}
