/* What the user sees: lines that begin with "uenv: ". */
#ifndef UENVD_REPORT_H
#define UENVD_REPORT_H

#include "failure.h"
#include "proto.h"

/* Print a text of one or more lines; `node` (NULL: none) goes before the first. Control characters become '?'. */
void report_text(const char *node, const char *text);
/* Print message and hint. */
void report_failure(const char *node, const struct failure *failure);
/*
 * Print the notes of an answer but those that `seen` (NULL: none) says have been shown. `*shown` (may be NULL) becomes the like text for
 * all notes of the answer, to be freed: a comma list of hashes. False: out of memory.
 */
bool report_notes(const char *node, const struct reply *reply, const char *seen, char **shown);

#endif
