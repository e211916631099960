#include "submit.h"

#include "environ.h"
#include "exchange.h"
#include "report.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *inherited(const char *name)
{
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

static bool same(const char *a, const char *b)
{
    return a == b || (a && b && !strcmp(a, b));
}

/* Whether an image is named by a path that means another file in another directory. */
static bool has_relative_path(const char *spec)
{
    for (; spec; spec = strchr(spec, ',') ? strchr(spec, ',') + 1 : NULL)
        if (spec[strspn(spec, " \t")] == '.')
            return true;
    return false;
}

static bool export(const char *name, const char *value, struct failure *failure)
{
    if (value && strlen(name) + 1 + strlen(value) > MAX_ENV_STRING_BYTES)
        return failure_set(failure, CODE_USAGE, "name fewer images", "the list of images is too long for a job's environment");
    if ((value ? setenv(name, value, 1) : unsetenv(name)) < 0)
        return failure_set(failure, CODE_INTERNAL, NULL, "cannot set %s: %s", name, strerror(errno));
    return true;
}

/* The texts may lie in the environment that this changes. */
static bool export_all(const char *spec, const char *images, const char *view, struct failure *failure)
{
    char *own_spec = spec ? strdup(spec) : NULL, *own_images = images ? strdup(images) : NULL;
    char *own_view = view ? strdup(view) : NULL;
    bool fine = (own_spec || !spec) && (own_images || !images) && (own_view || !view)
                    ? export(VAR_SPEC, own_spec, failure) && export(VAR_IMAGES, own_images, failure) &&
                          export(VAR_VIEW, own_view, failure) && export(VAR_OPTION_UENV, own_spec, failure) &&
                          export(VAR_OPTION_VIEW, own_view, failure)
                    : failure_memory(failure);
    free(own_spec);
    free(own_images);
    free(own_view);
    return fine;
}

/* Ask uenvd what `uenv` means, now, and export it as the meaning of `spec`. */
static bool resolve(const struct plugin *plugin, const char *spec, const char *uenv, const char *view, struct failure *failure)
{
    struct request request = REQUEST_EMPTY;
    char *directory = getcwd(NULL, 0);
    request.op = "resolve";
    request.uenv = uenv;
    request.view = view;
    request.cwd = directory;
    struct client client = CLIENT_CLOSED;
    struct reply reply = REPLY_NONE;
    const char *images = NULL;
    struct patience patience = {.total_ms = plugin->settings.timeout_ms};
    bool fine = exchange(&client, &plugin->settings, &request, patience, NULL, NULL, &reply, failure) &&
                reply_resolved(&reply, &images, failure);
    if (fine) {
        report_notes(NULL, &reply);
        fine = export_all(spec, images, view, failure);
    }
    reply_free(&reply);
    client_close(&client);
    free(directory);
    return fine;
}

static bool settle(const struct plugin *plugin, const struct choice *choice, struct failure *failure)
{
    const char *known_spec = inherited(VAR_SPEC), *known_images = inherited(VAR_IMAGES), *known_view = inherited(VAR_VIEW);
    const char *spec = choice->uenv.text ? choice->uenv.text : known_spec;
    bool typed = choice->uenv.text && !choice->uenv.inherited;
    if (choice->memory)
        return failure_memory(failure);
    if (!spec)
        return failure_set(failure, CODE_USAGE, "add --uenv=LABEL", "--view needs an image");
    if (!strcmp(spec, SPEC_NONE)) {
        if (choice->view.text && !choice->view.inherited)
            return failure_set(failure, CODE_USAGE, "leave out --view, or name an image", "--uenv=none has no views");
        return export_all(NULL, NULL, NULL, failure) && export(VAR_OPTION_UENV, SPEC_NONE, failure);
    }
    if (plugin->config.set)
        return failure_set(failure, CODE_CONFIG, plugin->config.hint, "%s", failure_message(&plugin->config));
    bool known = known_images && same(spec, known_spec) && !(typed && has_relative_path(spec));
    const char *view = choice->view.text;
    if (known && !view)
        view = known_view;
    else if (!known && typed && choice->view.inherited)
        view = NULL; /* another image replaces the inherited one with its view */
    /* A job's own sruns get the images that the job got, even where the tag has moved or no daemon answers. */
    if (!known)
        return resolve(plugin, spec, spec, view, failure);
    if (!same(view, known_view))
        return resolve(plugin, spec, known_images, view, failure);
    return export_all(spec, known_images, view, failure);
}

bool submit_resolve(const struct plugin *plugin, const struct choice *choice)
{
    if (!choice->uenv.text && !choice->view.text)
        return true; /* variables of an enclosing job, if any, pass by themselves */
    struct failure failure = FAILURE_NONE;
    bool fine = settle(plugin, choice, &failure);
    if (!fine)
        report_failure(NULL, &failure);
    failure_clear(&failure);
    return fine;
}
