#include "args.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

static bool parse_number(const char *text, long long low, long long high, long long *value)
{
    char *end;
    errno = 0;
    *value = strtoll(text, &end, 10);
    return *text && !*end && !errno && *value >= low && *value <= high;
}

static bool parse_one(struct settings *settings, const char *argument)
{
    long long number;
    if (!strncmp(argument, "socket=", 7)) {
        settings->socket = argument + 7;
        return argument[7] == '/' && strlen(argument + 7) < sizeof(((struct sockaddr_un *)0)->sun_path);
    }
    if (!strncmp(argument, "timeout_ms=", 11)) {
        if (!parse_number(argument + 11, 100, 60000, &number))
            return false;
        settings->timeout_ms = number;
        return true;
    }
    if (!strncmp(argument, "silence_ms=", 11)) {
        if (!parse_number(argument + 11, 100, 600000, &number))
            return false;
        settings->silence_ms = number;
        return true;
    }
    if (!strncmp(argument, "login=", 6)) {
        settings->login_optional = !strcmp(argument + 6, "optional");
        return settings->login_optional || !strcmp(argument + 6, "required");
    }
    if (!strncmp(argument, "namespace=", 10)) {
        static const char *const words[] = {[NAMESPACE_AUTO] = "auto", [NAMESPACE_STEP] = "step", [NAMESPACE_TASK] = "task"};
        for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
            if (!strcmp(argument + 10, words[i])) {
                settings->namespace_owner = (enum namespace_owner)i;
                return true;
            }
        }
        return false;
    }
    if (!strncmp(argument, "peer_uid=", 9)) {
        if (!parse_number(argument + 9, 0, UINT32_MAX - 1, &number))
            return false;
        settings->peer_uid = (uid_t)number;
        return true;
    }
    return false;
}

bool settings_parse(struct settings *settings, int argc, char *const argv[], struct failure *failure)
{
    const struct settings defaults = {
        .socket = DEFAULT_SOCKET,
        .timeout_ms = DEFAULT_TIMEOUT_MS,
        .silence_ms = DEFAULT_SILENCE_MS,
        .peer_uid = 0,
        .login_optional = false,
        .namespace_owner = NAMESPACE_AUTO,
    };
    *settings = defaults;
    for (int i = 0; i < argc; i++) {
        if (!parse_one(settings, argv[i])) {
            *settings = defaults;
            return failure_set(failure, CODE_CONFIG,
                               "arguments are socket=/PATH timeout_ms=N silence_ms=N peer_uid=N login=required|optional "
                               "namespace=auto|step|task; see uenvd's docs/slurm.md",
                               "wrong argument '%s' of uenvd_spank.so in plugstack.conf", argv[i]);
        }
    }
    return true;
}
