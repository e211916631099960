#include "wish.h"

#include "spank_wrap.h"

#include <stdlib.h>
#include <string.h>

void wish_free(struct wish *wish)
{
    free(wish->uenv);
    free(wish->view);
    free(wish->directory);
    *wish = (struct wish)WISH_NONE;
}

static char *job_variable(spank_t spank, const char *name, bool *fine)
{
    bool ok;
    char *value = sw_getenv(spank, name, &ok);
    if (!ok)
        *fine = false;
    if (value && !*value) {
        free(value);
        value = NULL;
    }
    return value;
}

static char *take(char **text)
{
    char *taken = *text;
    *text = NULL;
    return taken;
}

static bool same(const char *a, const char *b)
{
    return a && b && !strcmp(a, b);
}

/* The variables of a job, all owned. */
struct variables {
    char *spec, *images, *view, *instead_of, *option_uenv, *option_view, *lookup, *directory;
};

static void variables_free(struct variables *given)
{
    char *texts[] = {given->spec,        given->images,      given->view,   given->instead_of,
                     given->option_uenv, given->option_view, given->lookup, given->directory};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        free(texts[i]);
}

bool wish_find(spank_t spank, const struct choice *choice, struct wish *wish)
{
    bool fine = !choice->memory;
    struct variables given = {
        .spec = job_variable(spank, VAR_SPEC, &fine),
        .images = job_variable(spank, VAR_IMAGES, &fine),
        .view = job_variable(spank, VAR_VIEW, &fine),
        .instead_of = job_variable(spank, VAR_INSTEAD_OF, &fine),
        .option_uenv = job_variable(spank, VAR_OPTION_UENV, &fine),
        .option_view = job_variable(spank, VAR_OPTION_VIEW, &fine),
        .lookup = job_variable(spank, VAR_LOOKUP, &fine),
        .directory = job_variable(spank, "SLURM_SUBMIT_DIR", &fine),
    };
    const char *option = choice->uenv.text;
    *wish = (struct wish){.lookup = given.lookup != NULL, .directory = take(&given.directory)};
    if (given.spec && (!option || same(option, given.spec) || same(option, given.instead_of) || wish->lookup)) {
        wish->resolved = given.images != NULL && !wish->lookup;
        wish->uenv = wish->resolved ? take(&given.images) : take(&given.spec);
        wish->view = take(&given.view);
    } else {
        wish->uenv = option ? strdup(option) : take(&given.option_uenv);
        wish->view = choice->view.text ? strdup(choice->view.text) : take(given.view ? &given.view : &given.option_view);
        fine = fine && (wish->uenv || !option) && (wish->view || !choice->view.text);
    }
    variables_free(&given);
    if (!fine)
        wish_free(wish);
    return fine;
}

bool wish_is_pinned(const char *uenv)
{
    for (const char *image = uenv; *image; image += strcspn(image, ",") + (image[strcspn(image, ",")] == ',')) {
        const char *start = image + strspn(image, " \t");
        const char *digest = strstr(start, "@sha256:");
        bool pinned = digest && digest < start + strcspn(start, ",") && strspn(digest + 8, "0123456789abcdef") == 64;
        if (*start && *start != ',' && *start != '/' && *start != '.' && !pinned)
            return false;
    }
    return true;
}
