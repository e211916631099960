/* What the user sees: lines that begin with "uenv: ". */
#ifndef UENVD_REPORT_H
#define UENVD_REPORT_H

#include "failure.h"
#include "proto.h"

/* Print a text of one or more lines; `node` (NULL: none) goes before the first. Control characters become '?'. */
void report_text(const char *node, const char *text);
/* Print message and hint. */
void report_failure(const char *node, const struct failure *failure);
/* Print the notes of an answer. */
void report_notes(const char *node, const struct reply *reply);

#endif
