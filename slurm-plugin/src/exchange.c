#include "exchange.h"

#include "clock.h"

#include <stdlib.h>
#include <string.h>

static int64_t deadline_of(struct patience patience, int64_t start_ms)
{
    int64_t total_ms = patience.total_ms ? start_ms + patience.total_ms : INT64_MAX;
    int64_t silence_ms = patience.silence_ms ? clock_ms() + patience.silence_ms : INT64_MAX;
    return total_ms < silence_ms ? total_ms : silence_ms;
}

static bool converse(struct client *client, const struct settings *settings, const char *line, struct patience patience,
                     exchange_event *on_event, void *context, struct reply *reply, struct failure *failure)
{
    int64_t start_ms = clock_ms();
    int64_t deadline_ms = deadline_of(patience, start_ms);
    if (client->fd < 0 && !client_connect(client, settings->socket, settings->peer_uid, deadline_ms, failure))
        return false;
    if (!client_send(client, line, strlen(line), deadline_ms, failure))
        return false;
    for (;;) {
        char *frame = NULL;
        size_t length = 0;
        if (!client_receive(client, &frame, &length, deadline_of(patience, start_ms), failure))
            return false;
        struct failure reported = FAILURE_NONE;
        bool fine = reply_parse(reply, frame, length, &reported, failure);
        free(frame);
        if (!fine)
            return false;
        if (reply->kind == REPLY_SUCCESS)
            return true;
        if (reply->kind == REPLY_FAILURE) {
            failure_clear(failure);
            *failure = reported;
            return false;
        }
        if (on_event) {
            struct progress progress;
            reply_progress(reply, &progress);
            on_event(context, &progress);
        }
        reply_free(reply);
    }
}

bool exchange(struct client *client, const struct settings *settings, const struct request *request, struct patience patience,
              exchange_event *on_event, void *context, struct reply *reply, struct failure *failure)
{
    *reply = (struct reply)REPLY_NONE;
    char *line = request_encode(request, failure);
    if (!line)
        return false;
    bool fine = converse(client, settings, line, patience, on_event, context, reply, failure);
    free(line);
    if (fine)
        return true;
    reply_free(reply);
    if (failure->code && !strcmp(failure->code, CODE_TIMEOUT) && client->used == 0) {
        int64_t waited_ms = patience.total_ms ? patience.total_ms : patience.silence_ms;
        failure_set(failure, CODE_TIMEOUT, HINT_TIMEOUT, "uenvd does not answer: nothing came from %s for %lld.%lld s",
                    settings->socket, (long long)waited_ms / 1000, (long long)waited_ms % 1000 / 100);
    }
    return false;
}
