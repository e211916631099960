#include "failure.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void failure_clear(struct failure *failure)
{
    free(failure->code);
    free(failure->message);
    free(failure->hint);
    *failure = (struct failure)FAILURE_NONE;
}

bool failure_memory(struct failure *failure)
{
    failure_clear(failure);
    failure->set = true;
    return false;
}

bool failure_set(struct failure *failure, const char *code, const char *hint, const char *format, ...)
{
    /* The arguments may point into the failure that is replaced. */
    struct failure fresh = {.set = true};
    va_list arguments;
    va_start(arguments, format);
    if (vasprintf(&fresh.message, format, arguments) < 0)
        fresh.message = NULL;
    va_end(arguments);
    fresh.code = strdup(code);
    fresh.hint = hint && *hint ? strdup(hint) : NULL;
    failure_clear(failure);
    *failure = fresh;
    return false;
}

const char *failure_message(const struct failure *failure)
{
    return failure->message ? failure->message : "out of memory";
}
