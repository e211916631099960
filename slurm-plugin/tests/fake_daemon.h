/* A fake uenvd: plays a script on each connection, each in a thread of its own. */
#ifndef UENVD_FAKE_DAEMON_H
#define UENVD_FAKE_DAEMON_H

#include "args.h"

#include <pthread.h>
#include <stddef.h>

struct act {
    enum {
        ACT_END,     /* close the connection */
        ACT_REQUEST, /* read one line */
        ACT_SEND,    /* send `text` with `fds` attached to its first byte */
        ACT_SLOWLY,  /* send `text` byte by byte */
        ACT_FILL,    /* send `count` bytes 'x' */
        ACT_HOLD,    /* keep still until the peer closes */
    } kind;
    const char *text;
    const int *fds;
    size_t count; /* of fds or bytes */
};

#define MAX_CONNECTIONS 8

struct fake_daemon {
    struct settings settings; /* for the client */
    const struct act *scripts[MAX_CONNECTIONS];
    int script_count;
    char requests[MAX_CONNECTIONS][65536]; /* the line received on each connection, without newline */
    int request_count;
    int fds[MAX_CONNECTIONS];
    int accepted;
    int listener;
    pthread_t thread;
    struct player {
        pthread_t thread;
        struct fake_daemon *daemon;
        int number;
    } players[MAX_CONNECTIONS];
    pthread_mutex_t lock;
};

/* Start with one script for each connection to come, in order. */
void daemon_start(struct fake_daemon *daemon, const struct act *const *scripts, int count);
/*
 * The same in two halves: clients can connect after the first, the second begins its threads. A test that forks does so in between: a thread
 * that allocates while another forks leaves the child a locked allocator, in which LeakSanitizer would wait for ever.
 */
void daemon_listen(struct fake_daemon *daemon, const struct act *const *scripts, int count);
void daemon_serve(struct fake_daemon *daemon);
/* Wait until all scripts were played, and close everything. */
void daemon_join(struct fake_daemon *daemon);
/* End it although nobody came for some scripts. */
void daemon_cancel(struct fake_daemon *daemon);

#endif
