/* The hooks of SPANK, and nothing but: each goes to the file of its context. None ever returns a positive number or exits. */
#include "contexts.h"
#include "spank_wrap.h"
#include "submit.h"

#pragma GCC visibility push(default)
SPANK_PLUGIN(uenvd, 1)

int slurm_spank_init(spank_t spank, int argc, char *argv[]);
int slurm_spank_init_post_opt(spank_t spank, int argc, char *argv[]);
int slurm_spank_local_user_init(spank_t spank, int argc, char *argv[]);
int slurm_spank_task_init_privileged(spank_t spank, int argc, char *argv[]);
int slurm_spank_task_init(spank_t spank, int argc, char *argv[]);
int slurm_spank_exit(spank_t spank, int argc, char *argv[]);
#pragma GCC visibility pop

static struct plugin plugin;

int slurm_spank_init(spank_t spank, int argc, char *argv[])
{
    spank_context_t context = spank_context();
    if (context != S_CTX_LOCAL && context != S_CTX_ALLOCATOR && context != S_CTX_REMOTE)
        return 0;
    settings_parse(&plugin.settings, argc, argv, &plugin.config);
    if (!choice_register(spank))
        failure_set(&plugin.config, CODE_INTERNAL, NULL, "Slurm refuses the options --uenv and --view");
    return 0;
}

int slurm_spank_init_post_opt(spank_t spank, int argc, char *argv[])
{
    (void)argc, (void)argv;
    switch (spank_context()) {
    case S_CTX_LOCAL:
        return local_init_post_opt(&plugin, choice_get());
    case S_CTX_ALLOCATOR:
        return allocator_init_post_opt(&plugin, choice_get());
    case S_CTX_REMOTE:
        remote_init_post_opt(&plugin, choice_get(), spank);
        return 0;
    default:
        return 0;
    }
}

int slurm_spank_local_user_init(spank_t spank, int argc, char *argv[])
{
    (void)argc, (void)argv;
    return spank_context() == S_CTX_LOCAL ? local_user_init(spank) : 0;
}

int slurm_spank_task_init_privileged(spank_t spank, int argc, char *argv[])
{
    (void)spank, (void)argc, (void)argv;
    if (spank_context() == S_CTX_REMOTE)
        remote_task_init_privileged(&plugin);
    return 0;
}

int slurm_spank_task_init(spank_t spank, int argc, char *argv[])
{
    (void)argc, (void)argv;
    if (spank_context() == S_CTX_REMOTE)
        remote_task_init(&plugin, spank);
    return 0;
}

int slurm_spank_exit(spank_t spank, int argc, char *argv[])
{
    (void)spank, (void)argc, (void)argv;
    if (spank_context() == S_CTX_REMOTE)
        remote_exit();
    submit_forget();
    choice_clear(choice_get());
    failure_clear(&plugin.config);
    return 0;
}
