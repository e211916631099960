/*
 * The arguments of the plugin's line in plugstack.conf:
 *
 *   required uenvd_spank.so socket=/run/uenvd/control timeout_ms=3000 silence_ms=5000 peer_uid=0 login=required namespace=auto
 */
#ifndef UENVD_ARGS_H
#define UENVD_ARGS_H

#include "failure.h"

#include <stdint.h>
#include <sys/types.h>

#define DEFAULT_SOCKET "/run/uenvd/control"
#define DEFAULT_TIMEOUT_MS 3000
#define DEFAULT_SILENCE_MS 5000

/* Whose mount namespace gets the images: the step's, or that of each task where Slurm gives the tasks one of their own. */
enum namespace_owner { NAMESPACE_AUTO, NAMESPACE_STEP, NAMESPACE_TASK };

struct settings {
    const char *socket; /* points into argv, which lives as long as the plugin stack */
    int64_t timeout_ms; /* of one exchange as a whole, 100..60000 */
    int64_t silence_ms; /* without an event while bytes are awaited, 100..600000 */
    uid_t peer_uid;     /* of the process that listens on the socket */
    bool login_optional; /* where no uenvd runs a job may be submitted all the same: its first node resolves */
    enum namespace_owner namespace_owner;
};

/* Parse the arguments. On failure (unknown key, bad value) the settings are the defaults. */
bool settings_parse(struct settings *settings, int argc, char *const argv[], struct failure *failure);

#endif
