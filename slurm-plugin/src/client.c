#include "client.h"

#include "clock.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* Linux's SCM_MAX_FD (include/net/scm.h): one message carries at most so many descriptors. */
#define FDS_PER_MESSAGE 253
#define CHUNK_BYTES ((size_t)16 * 1024)
#define RETRY_MS 20

static bool fail_timeout(struct failure *failure)
{
    return failure_set(failure, CODE_TIMEOUT, HINT_TIMEOUT, "uenvd does not answer in time");
}

/* Wait for events until the deadline. False: time is up, or poll() failed. */
static bool await(int fd, short events, int64_t deadline_ms, struct failure *failure)
{
    for (;;) {
        int64_t left = deadline_ms - clock_ms();
        struct pollfd entry = {.fd = fd, .events = events};
        int ready = poll(&entry, 1, left <= 0 ? 0 : left > 60000 ? 60000 : (int)left);
        if (ready > 0)
            return true;
        if (ready == 0 && clock_ms() >= deadline_ms)
            return fail_timeout(failure);
        if (ready < 0 && errno != EINTR)
            return failure_set(failure, CODE_INTERNAL, NULL, "poll: %s", strerror(errno));
    }
}

/* What a uid without a mapping in this user namespace reads as: the kernel's fixed default (fs.overflowuid, never changed in practice). */
#define OVERFLOW_UID 65534

/*
 * Whether the node's root has no uid here, as for an srun in a session of uenvctl: then its peer cannot be told from another unmapped
 * one, and what vouches for it is that only root can make a socket in /run/uenvd.
 */
static bool root_is_hidden(void)
{
    unsigned long inside = 0, outside = 0;
    FILE *map = fopen("/proc/self/uid_map", "re");
    if (!map)
        return false;
    bool hidden = fscanf(map, "%lu %lu", &inside, &outside) == 2 && (inside != 0 || outside != 0);
    fclose(map);
    return hidden;
}

static bool check_peer(int fd, uid_t peer_uid, const char *path, struct failure *failure)
{
    struct ucred peer;
    socklen_t size = sizeof peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0)
        return failure_set(failure, CODE_UNREACHABLE, HINT_UNREACHABLE, "%s: %s", path, strerror(errno));
    if (peer.uid != peer_uid && !(peer_uid == 0 && peer.uid == OVERFLOW_UID && root_is_hidden()))
        return failure_set(failure, CODE_UNREACHABLE, HINT_UNREACHABLE,
                           "who listens on %s is not uenvd: it runs as uid %lu, not %lu", path, (unsigned long)peer.uid,
                           (unsigned long)peer_uid);
    return true;
}

bool client_connect(struct client *client, const char *path, uid_t peer_uid, int64_t deadline_ms, struct failure *failure)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return failure_set(failure, CODE_CONFIG, NULL, "the path of uenvd's socket is too long: %s", path);
    memcpy(address.sun_path, path, strlen(path) + 1);
    client_close(client);
    client->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (client->fd < 0)
        return failure_set(failure, CODE_UNREACHABLE, NULL, "cannot make a socket: %s", strerror(errno));
    /* On a Unix socket EAGAIN says that the listener's backlog is full, which poll() does not report. */
    while (connect(client->fd, (struct sockaddr *)&address, sizeof address) < 0) {
        if (errno == EISCONN)
            break;
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN) {
            failure_set(failure, errno == ENOENT || errno == ECONNREFUSED ? CODE_ABSENT : CODE_UNREACHABLE, HINT_UNREACHABLE,
                        "uenvd is not running: %s: %s", path, strerror(errno));
            client_close(client);
            return false;
        }
        if (clock_ms() >= deadline_ms) {
            client_close(client);
            return fail_timeout(failure);
        }
        poll(NULL, 0, RETRY_MS);
    }
    if (!check_peer(client->fd, peer_uid, path, failure)) {
        client_close(client);
        return false;
    }
    return true;
}

bool client_send(struct client *client, const char *bytes, size_t length, int64_t deadline_ms, struct failure *failure)
{
    while (length > 0) {
        ssize_t sent = send(client->fd, bytes, length, MSG_NOSIGNAL);
        if (sent >= 0) {
            bytes += sent;
            length -= (size_t)sent;
        } else if (errno == EAGAIN) {
            if (!await(client->fd, POLLOUT, deadline_ms, failure))
                return false;
        } else if (errno != EINTR) {
            return failure_set(failure, CODE_UNREACHABLE, HINT_UNREACHABLE, "the connection to uenvd broke: %s",
                               strerror(errno));
        }
    }
    return true;
}

static bool keep_fds(struct client *client, const int *fds, size_t count, struct failure *failure)
{
    if (client->fd_count + count > client->fd_size) {
        size_t size = (client->fd_count + count) * 2;
        int *grown = realloc(client->fds, size * sizeof *grown);
        if (!grown) {
            for (size_t i = 0; i < count; i++)
                close(fds[i]);
            return failure_memory(failure);
        }
        client->fds = grown;
        client->fd_size = size;
    }
    memcpy(client->fds + client->fd_count, fds, count * sizeof *fds);
    client->fd_count += count;
    return true;
}

static bool keep_control(struct client *client, struct msghdr *message, struct failure *failure)
{
    bool fine = true;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        int fds[FDS_PER_MESSAGE];
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(fds, CMSG_DATA(part), count * sizeof(int));
        if (!keep_fds(client, fds, count, failure))
            fine = false;
    }
    if (fine && message->msg_flags & MSG_CTRUNC)
        fine = failure_set(failure, CODE_MOUNT_FAILED, "raise the limit of open files (LimitNOFILE) of slurmd",
                           "this process has no room for the descriptors of the mounts");
    return fine;
}

/* Receive some bytes into `pending`. */
static bool receive_some(struct client *client, int64_t deadline_ms, struct failure *failure)
{
    if (client->size - client->used < CHUNK_BYTES) {
        size_t size = client->size * 2 + CHUNK_BYTES;
        char *grown = realloc(client->pending, size);
        if (!grown)
            return failure_memory(failure);
        client->pending = grown;
        client->size = size;
    }
    for (;;) {
        union {
            char bytes[CMSG_SPACE(FDS_PER_MESSAGE * sizeof(int))];
            struct cmsghdr align;
        } control;
        struct iovec space = {.iov_base = client->pending + client->used, .iov_len = client->size - client->used};
        struct msghdr message = {
            .msg_iov = &space, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
        ssize_t got = recvmsg(client->fd, &message, MSG_CMSG_CLOEXEC);
        if (got > 0) {
            client->used += (size_t)got;
            return keep_control(client, &message, failure);
        }
        if (got == 0)
            return failure_set(failure, CODE_UNREACHABLE, HINT_UNREACHABLE, "uenvd closed the connection without an answer");
        if (errno == EAGAIN) {
            if (!await(client->fd, POLLIN, deadline_ms, failure))
                return false;
        } else if (errno != EINTR) {
            return failure_set(failure, CODE_UNREACHABLE, HINT_UNREACHABLE, "the connection to uenvd broke: %s",
                               strerror(errno));
        }
    }
}

bool client_receive(struct client *client, char **frame, size_t *length, int64_t deadline_ms, struct failure *failure)
{
    for (;;) {
        char *end = client->used > client->searched
                        ? memchr(client->pending + client->searched, '\n', client->used - client->searched)
                        : NULL;
        size_t line = end ? (size_t)(end - client->pending) : client->used;
        if (line > MAX_REPLY_BYTES)
            return failure_set(failure, CODE_PROTOCOL, HINT_PROTOCOL, "an answer of uenvd is longer than %zu bytes",
                               MAX_REPLY_BYTES);
        if (end) {
            *frame = malloc(line + 1);
            if (!*frame)
                return failure_memory(failure);
            memcpy(*frame, client->pending, line);
            (*frame)[line] = '\0';
            *length = line;
            client->used -= line + 1;
            memmove(client->pending, end + 1, client->used);
            client->searched = 0;
            return true;
        }
        client->searched = client->used;
        if (!receive_some(client, deadline_ms, failure))
            return false;
    }
}

int *client_take_fds(struct client *client, size_t *count)
{
    int *fds = client->fds;
    *count = client->fd_count;
    client->fds = NULL;
    client->fd_count = client->fd_size = 0;
    return fds;
}

void close_fds(int *fds, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    free(fds);
}

void client_close(struct client *client)
{
    if (client->fd >= 0)
        close(client->fd);
    close_fds(client->fds, client->fd_count);
    free(client->pending);
    *client = (struct client)CLIENT_CLOSED;
}
