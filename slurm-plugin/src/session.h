/*
 * The images that are mounted in this process's own namespace: the truth about a session or a job step, which no variable can forge.
 * Form of mountinfo: proc(5); the source of an image's mount is "uenvd:DIGEST" or "uenvd:/PATH".
 */
#ifndef UENVD_SESSION_H
#define UENVD_SESSION_H

#include "failure.h"

#include <stddef.h>

struct session_image {
    char *source; /* "sha256:..." or the path of a file */
    char *mount;
};

struct session {
    struct session_image *items; /* topmost mounts only, outer ones first */
    size_t count;
};

#define SESSION_NONE {NULL, 0}

/* Read /proc/self/mountinfo; one that cannot be read is one without images. False: out of memory. */
bool session_read(struct session *session, struct failure *failure);
/* The same from a text. */
bool session_parse(const char *text, struct session *session, struct failure *failure);
void session_free(struct session *session);

/*
 * Names the mount namespace of this process, "HOST/INODE of /proc/self/ns/mnt": no other has this name while this one exists. To be freed;
 * NULL: no memory, or no such file.
 */
char *session_place(void);

/* A description list that names exactly these images; to be freed, NULL without memory. */
char *session_describe(const struct session *session);
/* Whether a description list by digest names exactly these images. */
bool session_matches(const struct session *session, const char *images);
/*
 * The views of these images among those that UENV_VIEW ("mount:uenv:view,...", may be NULL) says are loaded, as a view list; "none" if there
 * are none. To be freed, NULL without memory.
 */
char *session_views(const struct session *session, const char *loaded);

#endif
