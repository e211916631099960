#include "spank_fake.h"

#include "check.h"

#include <errno.h>
#include <slurm/slurm.h>
#include <stdarg.h>
#include <unistd.h>

/* Not subject to the injected failures. */
char *__real_strdup(const char *text);

struct spank_fake fake;

/* As libslurm exports it. */
slurm_conf_t slurm_conf;

void fake_namespace_plugin(char *type)
{
#if SLURM_VERSION_NUMBER >= SLURM_VERSION_NUM(25, 11, 0)
    slurm_conf.namespace_plugin = type;
#else
    slurm_conf.job_container_plugin = type;
#endif
}

static struct {
    char *name;
    char *value;
} variables[4096];
static int variable_count;
static int calls;

void fake_reset(spank_context_t context)
{
    for (int i = 0; i < variable_count; i++) {
        free(variables[i].name);
        free(variables[i].value);
    }
    variable_count = calls = 0;
    fake = (struct spank_fake){.context = context, .job = 7, .nodes = 1, .uid = geteuid(), .gid = getegid(), .log_fd = -1};
}

static int find(const char *name)
{
    for (int i = 0; i < variable_count; i++)
        if (!strcmp(variables[i].name, name))
            return i;
    return -1;
}

void fake_setenv(const char *name, const char *value)
{
    int at = find(name);
    if (at < 0) {
        at = variable_count++;
        CHECK(at < 4096);
        variables[at].name = __real_strdup(name);
        variables[at].value = NULL;
    }
    free(variables[at].value);
    variables[at].value = __real_strdup(value);
}

const char *fake_getenv(const char *name)
{
    int at = find(name);
    return at < 0 ? NULL : variables[at].value;
}

int fake_variable_count(void)
{
    return variable_count;
}

int fake_option(const char *name, const char *value)
{
    for (int i = 0; i < fake.option_count; i++)
        if (!strcmp(fake.options[i]->name, name))
            return fake.options[i]->cb(fake.options[i]->val, value, fake.context == S_CTX_REMOTE);
    CHECK_IN(false, name);
    return -1;
}

static bool failing(const char *function)
{
    return fake.failing && !strcmp(fake.failing, function) && calls++ >= fake.failing_from;
}

spank_context_t spank_context(void)
{
    return fake.context;
}

spank_err_t spank_option_register(spank_t spank, struct spank_option *option)
{
    (void)spank;
    if (failing("spank_option_register"))
        return ESPANK_BAD_ARG;
    CHECK(fake.option_count < 8);
    fake.options[fake.option_count++] = option;
    return ESPANK_SUCCESS;
}

spank_err_t spank_get_item(spank_t spank, spank_item_t item, ...)
{
    (void)spank;
    if (failing("spank_get_item"))
        return ESPANK_BAD_ARG;
    va_list arguments;
    va_start(arguments, item);
    spank_err_t result = ESPANK_SUCCESS;
    switch (item) {
    case S_JOB_ID:
        *va_arg(arguments, uint32_t *) = fake.job;
        break;
    case S_JOB_STEPID:
        *va_arg(arguments, uint32_t *) = fake.step;
        break;
    case S_JOB_UID:
        *va_arg(arguments, uid_t *) = fake.uid;
        break;
    case S_JOB_GID:
        *va_arg(arguments, gid_t *) = fake.gid;
        break;
    case S_JOB_SUPPLEMENTARY_GIDS:
        *va_arg(arguments, gid_t **) = fake.groups;
        *va_arg(arguments, int *) = fake.group_count;
        break;
    case S_JOB_NNODES:
        *va_arg(arguments, uint32_t *) = fake.nodes;
        break;
    case S_TASK_ID:
        *va_arg(arguments, int *) = fake.task;
        break;
    default:
        result = ESPANK_BAD_ARG;
    }
    va_end(arguments);
    return result;
}

spank_err_t spank_getenv(spank_t spank, const char *name, char *buffer, int length)
{
    (void)spank;
    if (failing("spank_getenv"))
        return ESPANK_BAD_ARG;
    const char *value = fake_getenv(name);
    if (!value)
        return ESPANK_ENV_NOEXIST;
    int needed = snprintf(buffer, (size_t)length, "%s", value);
    return needed >= length ? ESPANK_NOSPACE : ESPANK_SUCCESS;
}

spank_err_t spank_setenv(spank_t spank, const char *name, const char *value, int overwrite)
{
    (void)spank;
    CHECK(overwrite == 1);
    if (failing("spank_setenv"))
        return ESPANK_BAD_ARG;
    fake_setenv(name, value);
    return ESPANK_SUCCESS;
}

spank_err_t spank_unsetenv(spank_t spank, const char *name)
{
    (void)spank;
    if (failing("spank_unsetenv"))
        return ESPANK_BAD_ARG;
    int at = find(name);
    if (at >= 0) {
        free(variables[at].name);
        free(variables[at].value);
        variables[at] = variables[--variable_count];
    }
    return ESPANK_SUCCESS;
}

void slurm_spank_log(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    if (fake.log_fd >= 0) {
        vdprintf(fake.log_fd, format, arguments);
        dprintf(fake.log_fd, "\n");
    }
    va_end(arguments);
}

void slurm_debug(const char *format, ...)
{
    (void)format;
}
