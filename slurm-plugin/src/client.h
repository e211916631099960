/*
 * One connection to uenvd's control socket: bytes and descriptors, no meaning (docs/protocol.md, "Transport").
 * Every wait has a deadline; nothing blocks beyond it, whatever the peer does. All descriptors are close-on-exec.
 */
#ifndef UENVD_CLIENT_H
#define UENVD_CLIENT_H

#include "failure.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define MAX_REQUEST_BYTES ((size_t)64 * 1024)
#define MAX_REPLY_BYTES ((size_t)4 * 1024 * 1024)

struct client {
    int fd;          /* -1: not connected */
    char *pending;   /* bytes received and not yet taken as frames */
    size_t used;
    size_t size;
    size_t searched; /* so many bytes of `pending` hold no newline */
    int *fds;        /* descriptors received and not yet taken */
    size_t fd_count;
    size_t fd_size;
};

#define CLIENT_CLOSED {-1, NULL, 0, 0, 0, NULL, 0, 0}

/* Connect, and check that the listener runs as `peer_uid`. */
bool client_connect(struct client *client, const char *path, uid_t peer_uid, int64_t deadline_ms, struct failure *failure);

/* Send all bytes. */
bool client_send(struct client *client, const char *bytes, size_t length, int64_t deadline_ms, struct failure *failure);

/*
 * Receive one frame (without its newline, NUL-terminated, to be freed by the caller). Descriptors that came with it are kept
 * for client_take_fds(). After a failure the connection is of no more use.
 */
bool client_receive(struct client *client, char **frame, size_t *length, int64_t deadline_ms, struct failure *failure);

/* Hand over the descriptors received so far; the caller closes them and frees the array (NULL when there are none). */
int *client_take_fds(struct client *client, size_t *count);

/* Close it and everything received. */
void client_close(struct client *client);

/* Close descriptors and free their array. */
void close_fds(int *fds, size_t count);

#endif
