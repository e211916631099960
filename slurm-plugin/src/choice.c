#include "choice.h"

#include "spank_wrap.h"

#include <stdlib.h>
#include <string.h>

enum { OPTION_UENV, OPTION_VIEW };

static struct choice given;

static int take_option(int which, const char *text, int remote)
{
    struct option_value *value = which == OPTION_UENV ? &given.uenv : &given.view;
    const char *exported = remote ? NULL : getenv(which == OPTION_UENV ? VAR_OPTION_UENV : VAR_OPTION_VIEW);
    /* Slurm calls back for the variable first, then for the command line; the last call counts. */
    bool inherited = !value->text && exported && text && !strcmp(exported, text);
    free(value->text);
    value->text = strdup(text ? text : "");
    value->inherited = inherited;
    given.memory = given.memory || !value->text;
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
     .usage = "set environment variables as these views of the uenv say",
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
    free(choice->view.text);
    *choice = (struct choice){0};
}
