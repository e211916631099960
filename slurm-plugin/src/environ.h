/*
 * Applies the operations of a view to an environment: docs/protocol.md, "The environment". Idempotent. Pure: the
 * environment is whatever the caller's functions say. Vectors, shared with uenvd/views.py: tests/vectors/views/.
 */
#ifndef UENVD_ENVIRON_H
#define UENVD_ENVIRON_H

#include "failure.h"
#include "proto.h"

#define ENV_APPLIED "UENV_APPLIED"
/* What a login shell puts back; uenvd sets it by an operation like any other. */
#define ENV_RESTORE "UENV_RESTORE"

/* Longest NAME=value that the kernel passes to a program: MAX_ARG_STRLEN less the NUL (include/uapi/linux/binfmts.h). */
#define MAX_ENV_STRING_BYTES ((size_t)131071)

struct env_access {
    void *context;
    /* Return a copy of the value (to be freed) or NULL: not set. False in `*ok`: the environment cannot be read. */
    char *(*get)(void *context, const char *name, bool *ok);
    bool (*set)(void *context, const char *name, const char *value);
    bool (*unset)(void *context, const char *name);
};

/*
 * Apply in order, then set UENV_APPLIED to the key. An operation whose result no program could be started with is skipped.
 * False: the environment could not be read or changed, or memory ran out; it may be changed in part.
 */
bool environ_apply(const struct env_ops *ops, const struct env_access *access, struct failure *failure);

#endif
