/*
 * What the user asked for: the options --uenv and --view, and what an enclosing job or step passes on in its environment.
 *
 * Variables (names that begin with SLURM survive sbatch --export=NONE):
 *   SLURM_UENVD_SPEC        --uenv as typed
 *   SLURM_UENVD_IMAGES      the same images by digest, as uenvd resolved them at submission; absent: not resolved yet
 *   SLURM_UENVD_VIEW        --view; absent: not given
 *   SLURM_UENVD_INSTEAD_OF  the value of the option that Slurm delivers to the job although SPEC has taken its place
 *   SLURM_UENVD_SESSION     where salloc was started, if images were mounted there (session_place); an srun there means the job's images
 *   SLURM_UENVD_NOTED       which notes the user has seen at submission (report.h)
 *   SLURM_UENVD_LOOKUP      this step only finds out what SPEC means (lookup.h)
 * sbatch and salloc themselves export SLURM_SPANK__SLURM_SPANK_OPTION_uenvd_{uenv,view} so that an srun in the job
 * behaves as if it had been given the same options; the plugin keeps these in step with its own. SLURM_UENV and SLURM_UENV_VIEW are input
 * of srun (as SBATCH_* of sbatch, SALLOC_* of salloc), and output for scripts.
 */
#ifndef UENVD_CHOICE_H
#define UENVD_CHOICE_H

#include "failure.h"

#include <slurm/spank.h>
#include <stdbool.h>

#define VAR_SPEC "SLURM_UENVD_SPEC"
#define VAR_IMAGES "SLURM_UENVD_IMAGES"
#define VAR_VIEW "SLURM_UENVD_VIEW"
#define VAR_INSTEAD_OF "SLURM_UENVD_INSTEAD_OF"
#define VAR_SESSION "SLURM_UENVD_SESSION"
#define VAR_NOTED "SLURM_UENVD_NOTED"
#define VAR_LOOKUP "SLURM_UENVD_LOOKUP"
#define VAR_SRUN_UENV "SLURM_UENV"
#define VAR_SRUN_VIEW "SLURM_UENV_VIEW"
#define VAR_OPTION_UENV "SLURM_SPANK__SLURM_SPANK_OPTION_uenvd_uenv"
#define VAR_OPTION_VIEW "SLURM_SPANK__SLURM_SPANK_OPTION_uenvd_view"

/* `--uenv=none`: no image, also where one would be inherited. */
#define SPEC_NONE "none"
/* `--view=none`: no view, not even an image's default one; uenvd knows the word. */
#define VIEW_NONE "none"

struct option_value {
    char *text;      /* NULL: not given */
    bool inherited;  /* it came from the environment of an enclosing job, not from the command line or the script */
    char *delivered; /* the value that Slurm itself hands to the job: the last it saw, which need not be `text` */
    bool seen;       /* the environment's value, among those that Slurm called back for */
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
/* Forget them: also before the next component of a heterogeneous job, whose options Slurm reads anew. */
void choice_clear(struct choice *choice);

#endif
