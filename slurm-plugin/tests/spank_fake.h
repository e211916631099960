/* A fake libslurm: the functions of spank.h that the plugin uses, over state that a test prepares. */
#ifndef UENVD_SPANK_FAKE_H
#define UENVD_SPANK_FAKE_H

#include <slurm/spank.h>
#include <stdint.h>
#include <sys/types.h>

struct spank_fake {
    spank_context_t context;
    uint32_t job;
    uint32_t step;
    uint32_t nodes;
    uid_t uid;
    gid_t gid;
    gid_t groups[4];
    int group_count;
    int task;
    const char *failing;   /* name of a function that returns an error */
    int failing_from;      /* ... from this call of it on (0: the first) */
    int log_fd;            /* where slurm_spank_log writes; -1: nowhere */
    struct spank_option *options[8];
    int option_count;
};

extern struct spank_fake fake;

/* As if JobContainerType (newer: NamespaceType) had this value in slurm.conf; NULL: none. */
void fake_namespace_plugin(char *type);

/* Start anew in this context, with an empty job environment. */
void fake_reset(spank_context_t context);
void fake_setenv(const char *name, const char *value);
const char *fake_getenv(const char *name);
int fake_variable_count(void);
/* What Slurm does with an option on the command line, or from the environment. */
int fake_option(const char *name, const char *value);

#endif
