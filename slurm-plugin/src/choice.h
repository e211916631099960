/*
 * What the user asked for: the options --uenv and --view, and what an enclosing job or step passes on in its environment.
 *
 * Variables (names that begin with SLURM survive sbatch --export=NONE):
 *   SLURM_UENVD_SPEC     --uenv as typed
 *   SLURM_UENVD_IMAGES   the same images by digest, as uenvd resolved them at submission
 *   SLURM_UENVD_VIEW     --view; absent: none
 * sbatch and salloc themselves export SLURM_SPANK__SLURM_SPANK_OPTION_uenvd_{uenv,view} so that an srun in the job
 * behaves as if it had been given the same options; the plugin keeps these in step with its own.
 */
#ifndef UENVD_CHOICE_H
#define UENVD_CHOICE_H

#include "failure.h"

#include <slurm/spank.h>
#include <stdbool.h>

#define VAR_SPEC "SLURM_UENVD_SPEC"
#define VAR_IMAGES "SLURM_UENVD_IMAGES"
#define VAR_VIEW "SLURM_UENVD_VIEW"
#define VAR_OPTION_UENV "SLURM_SPANK__SLURM_SPANK_OPTION_uenvd_uenv"
#define VAR_OPTION_VIEW "SLURM_SPANK__SLURM_SPANK_OPTION_uenvd_view"

/* `--uenv=none`: no image, also where one would be inherited. */
#define SPEC_NONE "none"

struct option_value {
    char *text;     /* NULL: not given */
    bool inherited; /* it came from the environment of an enclosing job, not from the command line */
};

struct choice {
    struct option_value uenv;
    struct option_value view;
    bool memory; /* ran out while an option was read */
};

/* Register both options; from slurm_spank_init() in the contexts that have options. */
bool choice_register(spank_t spank);
/* The options of this process. */
struct choice *choice_get(void);
void choice_clear(struct choice *choice);

#endif
