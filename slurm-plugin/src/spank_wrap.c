#include "spank_wrap.h"

#include <slurm/slurm.h>
#include <stdlib.h>
#include <string.h>

/* Values longer than this cannot be in the environment of any process. */
#define MAX_VALUE_BYTES ((size_t)16 * 1024 * 1024)

bool sw_register_option(spank_t spank, struct spank_option *option)
{
    return spank_option_register(spank, option) == ESPANK_SUCCESS;
}

bool sw_step(spank_t spank, uint32_t *job, uint32_t *step, enum step_kind *kind)
{
    if (spank_get_item(spank, S_JOB_ID, job) != ESPANK_SUCCESS || spank_get_item(spank, S_JOB_STEPID, step) != ESPANK_SUCCESS)
        return false;
    *kind = *step == SLURM_EXTERN_CONT                                           ? STEP_EXTERN
            : *step == SLURM_BATCH_SCRIPT || *step == SLURM_INTERACTIVE_STEP ? STEP_SINGLE
                                                                             : STEP_ORDINARY;
    return true;
}

bool sw_job(spank_t spank, uint32_t *job)
{
    return spank_get_item(spank, S_JOB_ID, job) == ESPANK_SUCCESS;
}

bool sw_nodes(spank_t spank, uint32_t *nodes)
{
    return spank_get_item(spank, S_JOB_NNODES, nodes) == ESPANK_SUCCESS;
}

/* The configuration of the program that loads this plugin; weak, because libslurm does not promise to export it. */
extern slurm_conf_t slurm_conf __attribute__((weak));

bool sw_tasks_change_namespace(void)
{
    if (!&slurm_conf)
        return false;
#if SLURM_VERSION_NUMBER >= SLURM_VERSION_NUM(25, 11, 0)
    const char *plugin = slurm_conf.namespace_plugin;
#else
    const char *plugin = slurm_conf.job_container_plugin;
#endif
    const char *kind = plugin ? strrchr(plugin, '/') : NULL;
    return kind && (!strcmp(kind, "/tmpfs") || !strcmp(kind, "/linux"));
}

bool sw_user(spank_t spank, uid_t *uid, gid_t *gid, gid_t **groups, int *group_count)
{
    return spank_get_item(spank, S_JOB_UID, uid) == ESPANK_SUCCESS && spank_get_item(spank, S_JOB_GID, gid) == ESPANK_SUCCESS &&
           spank_get_item(spank, S_JOB_SUPPLEMENTARY_GIDS, groups, group_count) == ESPANK_SUCCESS;
}

bool sw_local_task(spank_t spank, int *task)
{
    return spank_get_item(spank, S_TASK_ID, task) == ESPANK_SUCCESS;
}

char *sw_getenv(spank_t spank, const char *name, bool *ok)
{
    *ok = true;
    for (size_t size = 4096; size <= MAX_VALUE_BYTES; size *= 4) {
        char *value = malloc(size);
        if (!value)
            break;
        spank_err_t result = spank_getenv(spank, name, value, (int)size);
        if (result == ESPANK_SUCCESS)
            return value;
        free(value);
        if (result == ESPANK_ENV_NOEXIST)
            return NULL;
        if (result != ESPANK_NOSPACE)
            break;
    }
    *ok = false;
    return NULL;
}

bool sw_setenv(spank_t spank, const char *name, const char *value)
{
    return spank_setenv(spank, name, value, 1) == ESPANK_SUCCESS;
}

bool sw_unsetenv(spank_t spank, const char *name)
{
    return spank_unsetenv(spank, name) == ESPANK_SUCCESS;
}

static char *environ_get(void *context, const char *name, bool *ok)
{
    return sw_getenv(context, name, ok);
}

static bool environ_set(void *context, const char *name, const char *value)
{
    return sw_setenv(context, name, value);
}

static bool environ_unset(void *context, const char *name)
{
    return sw_unsetenv(context, name);
}

struct env_access sw_environ(spank_t spank)
{
    return (struct env_access){spank, environ_get, environ_set, environ_unset};
}

void sw_print(const char *line)
{
    slurm_spank_log("%s", line);
}

void sw_debug(const char *line)
{
    slurm_debug("%s", line);
}
