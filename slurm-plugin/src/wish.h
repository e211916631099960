/* What a job step is to get, as its option and its variables say (choice.h). */
#ifndef UENVD_WISH_H
#define UENVD_WISH_H

#include "choice.h"

struct wish {
    char *uenv; /* NULL: nothing */
    char *view;
    char *directory; /* for relative paths that were not resolved at submission */
    bool resolved;   /* uenv names digests */
    bool lookup;     /* only find out what it means (lookup.h) */
};

#define WISH_NONE {NULL, NULL, NULL, false, false}

/*
 * The option, when Slurm delivers it (it does not to the batch step of sbatch --export=NONE), else the variables. What was
 * settled at submission counts if it belongs to this option: then image and view are exactly those that were checked there. False: the
 * environment of the job cannot be read, or memory ran out.
 */
bool wish_find(spank_t spank, const struct choice *choice, struct wish *wish);
void wish_free(struct wish *wish);

/* Whether every image of a description list is named by its digest, or is a file: then all nodes agree on what it means. */
bool wish_is_pinned(const char *uenv);

#endif
