/*
 * What went wrong: a code of the control protocol (uenvd/errors.py), a message of one or more lines and a hint.
 * A failure that is set stays valid without memory: a text that could not be copied becomes a fixed one.
 */
#ifndef UENVD_FAILURE_H
#define UENVD_FAILURE_H

#include <stdbool.h>

struct failure {
    bool set;
    char *code;
    char *message;
    char *hint; /* NULL: none */
};

#define FAILURE_NONE {false, NULL, NULL, NULL}

/* Codes that the plugin itself reports; those of uenvd pass through as text. */
#define CODE_USAGE "usage"
#define CODE_CONFIG "config"
#define CODE_INTERNAL "internal"
#define CODE_UNREACHABLE "daemon-unreachable"
#define CODE_ABSENT "daemon-absent" /* nobody listens at all; only within the plugin */
#define CODE_TIMEOUT "daemon-timeout"
#define CODE_PROTOCOL "protocol"
#define CODE_MOUNT_POINT "mount-point"
#define CODE_MOUNT_FAILED "mount-failed"

#define HINT_UNREACHABLE "ask the site's administrators to start it: systemctl start uenvd"
#define HINT_TIMEOUT "uenvd may be stopped or overloaded; try again or tell the site's administrators"
#define HINT_PROTOCOL "uenvd and its client may be of different versions"

/* Record a failure, replacing an earlier one. Always returns false, for `return failure_set(...)`. */
bool failure_set(struct failure *failure, const char *code, const char *hint, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* The same for lack of memory, without needing any. */
bool failure_memory(struct failure *failure);

const char *failure_message(const struct failure *failure);

/* Release the texts and make it unset. */
void failure_clear(struct failure *failure);

#endif
