/* One request and its answer on a connection. */
#ifndef UENVD_EXCHANGE_H
#define UENVD_EXCHANGE_H

#include "args.h"
#include "client.h"
#include "failure.h"
#include "proto.h"

#include <stdint.h>

struct patience {
    int64_t total_ms;   /* until the answer; 0: no bound */
    int64_t silence_ms; /* until the next event; 0: no bound of its own */
};

typedef void exchange_event(void *context, const struct progress *progress);

/*
 * Connect where the client is not connected yet, send the request, hand each event to `on_event` (may be NULL) and return the answer.
 * False: `*failure` says why, also when uenvd itself reported an error; the reply is then empty.
 */
bool exchange(struct client *client, const struct settings *settings, const struct request *request, struct patience patience,
              exchange_event *on_event, void *context, struct reply *reply, struct failure *failure);

#endif
