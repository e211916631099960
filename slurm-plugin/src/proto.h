/*
 * Frames of the control protocol as values, without the socket (docs/protocol.md; golden frames: tests/vectors/control/).
 * Parsing is strict where this plugin depends on a value and lenient about unknown keys. A malformed frame is a `protocol`
 * failure; no frame makes these functions crash, loop or use memory beyond a small multiple of its length.
 */
#ifndef UENVD_PROTO_H
#define UENVD_PROTO_H

#include "failure.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct json_object;

/* ---- requests: a frame with its newline, to be freed by the caller; NULL on failure */

struct request {
    const char *op;    /* resolve, mount, wait */
    const char *uenv;  /* resolve, mount; NULL: left out, as every other text */
    const char *view;
    const char *cwd;
    const char *lease; /* wait */
    int64_t uid;       /* -1: left out */
    int64_t gid;       /* -1: left out, with the groups */
    const gid_t *groups;
    size_t group_count;
    int64_t job;       /* -1: left out, with the step */
    int64_t step;
    bool submit;       /* resolve: for a job that is being submitted */
};

#define REQUEST_EMPTY {.uid = -1, .gid = -1, .job = -1, .step = -1}

char *request_encode(const struct request *request, struct failure *failure);

/* ---- replies */

enum reply_kind { REPLY_EVENT, REPLY_SUCCESS, REPLY_FAILURE };

struct reply {
    enum reply_kind kind;
    struct json_object *body;
};

#define REPLY_NONE {REPLY_EVENT, NULL}

/* Parse a frame. For REPLY_FAILURE `*reported` holds uenvd's error. False: the frame is malformed, see `*failure`. */
bool reply_parse(struct reply *reply, const char *frame, size_t length, struct failure *reported, struct failure *failure);
void reply_free(struct reply *reply);

/* An event: its message ("" when none) lives as long as the reply; sizes are -1 when unknown. */
struct progress {
    const char *message;
    int64_t done_bytes;
    int64_t total_bytes;
};
void reply_progress(const struct reply *reply, struct progress *progress);

/* The i-th note of a final frame, NULL after the last; lives as long as the reply. */
const char *reply_note(const struct reply *reply, size_t index);

/* The answer to `resolve`: the description list by digest (lives as long as the reply). */
bool reply_resolved(const struct reply *reply, const char **resolved, struct failure *failure);

/* The answer to `mount`. All texts are owned. */
struct mount_point {
    char *path;
    char *label;
    char *digest; /* NULL: a file */
    bool owned;   /* guard: only a directory of the user's own */
};
struct mounts {
    struct mount_point *items;
    size_t count;
    char *lease;
    bool waiting;
};
#define MOUNTS_NONE {NULL, 0, NULL, false}
bool reply_mounts(const struct reply *reply, struct mounts *mounts, struct failure *failure);
void mounts_free(struct mounts *mounts);

/* The operations on the environment, in the answers to `mount` (state ready) and `wait`. All texts are owned. */
enum env_op_kind { ENV_SET, ENV_UNSET, ENV_ASSIGN, ENV_PREPEND, ENV_APPEND };
struct env_op {
    enum env_op_kind kind;
    char *name;
    char **values; /* ENV_SET: one */
    size_t value_count;
};
struct env_ops {
    struct env_op *items;
    size_t count;
    char *applied;
};
#define ENV_OPS_NONE {NULL, 0, NULL}
bool reply_env_ops(const struct reply *reply, struct env_ops *ops, struct failure *failure);
/* The same from a bare array (the vectors in tests/vectors/views/ hold one). */
bool env_ops_parse(struct json_object *array, const char *applied, struct env_ops *ops, struct failure *failure);
void env_ops_free(struct env_ops *ops);

#endif
