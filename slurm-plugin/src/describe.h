/*
 * The variables by which scripts recognise a uenv, as uenvctl sets them too (docs/uenvctl.md). Pure. Truth is the mount; these
 * are a convenience. Each function returns a text to be freed, NULL without memory.
 */
#ifndef UENVD_DESCRIBE_H
#define UENVD_DESCRIBE_H

#include "proto.h"

#define VAR_MOUNT_LIST "UENV_MOUNT_LIST"
#define VAR_LABEL "UENV_LABEL"
#define VAR_DIGEST "UENV_DIGEST"
#define VAR_LOADED_VIEWS "UENV_VIEW"

/* "source:mount,..."; the source is a digest, or the path of a file. */
char *describe_mounts(const struct mounts *mounts);
/* "label,..." */
char *describe_labels(const struct mounts *mounts);
/* "digest,..."; an empty place for a file. */
char *describe_digests(const struct mounts *mounts);
/* "mount:uenv:view,..." from the key "identity[view,view];..." of what is applied; what is not of this form is left out. */
char *describe_views(const struct mounts *mounts, const char *applied);

#endif
