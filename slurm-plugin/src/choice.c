#include "choice.h"

#include "spank_wrap.h"

#include <stdlib.h>
#include <string.h>

enum { OPTION_UENV, OPTION_VIEW };

static struct choice given;

static bool keep(char **place, const char *text)
{
    free(*place);
    *place = strdup(text);
    return *place != NULL;
}

/*
 * srun calls back for the variable, then for the command line; sbatch for the script's directives, the variable and the command line. So a
 * value that is the variable's counts as such once, and only where nothing was typed, whatever the order.
 */
static int take_option(int which, const char *text, int remote)
{
    struct option_value *value = which == OPTION_UENV ? &given.uenv : &given.view;
    const char *exported = remote ? NULL : getenv(which == OPTION_UENV ? VAR_OPTION_UENV : VAR_OPTION_VIEW);
    text = text ? text : "";
    bool from_variable = exported && !value->seen && !strcmp(exported, text);
    value->seen = value->seen || from_variable;
    bool fine = keep(&value->delivered, text);
    if (!from_variable || !value->text) {
        fine = keep(&value->text, text) && fine;
        value->inherited = from_variable;
    }
    given.memory = given.memory || !fine;
    return 0;
}

static struct spank_option options[] = {
    {.name = "uenv",
     .arginfo = "label[,label...]",
     .usage = "show these software environments (NAME/VERSION:TAG, or a squashfs file) to the job; none: not even inherited ones",
     .has_arg = 1,
     .val = OPTION_UENV,
     .cb = take_option},
    {.name = "view",
     .arginfo = "view[,view...]",
     .usage = "set environment variables as these views of the uenv say; none: not even as its default view says",
     .has_arg = 1,
     .val = OPTION_VIEW,
     .cb = take_option},
};

bool choice_register(spank_t spank)
{
    return sw_register_option(spank, &options[0]) && sw_register_option(spank, &options[1]);
}

struct choice *choice_get(void)
{
    return &given;
}

void choice_clear(struct choice *choice)
{
    free(choice->uenv.text);
    free(choice->uenv.delivered);
    free(choice->view.text);
    free(choice->view.delivered);
    *choice = (struct choice){0};
}
