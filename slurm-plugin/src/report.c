#include "report.h"

#include "spank_wrap.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void print_line(const char *prefix, const char *mark, const char *line, size_t length)
{
    char *out = NULL;
    /* A line as long as a whole frame is cut by nobody: it is in memory already. */
    if (asprintf(&out, "uenv: %s%s%.*s", prefix, mark, (int)length, line) < 0) {
        sw_print("uenv: out of memory");
        return;
    }
    for (char *c = out; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?';
    sw_print(out);
    free(out);
}

void report_text(const char *node, const char *text)
{
    const char *prefix = node ? node : "", *mark = node ? ": " : "";
    for (;;) {
        size_t length = strcspn(text, "\n");
        print_line(prefix, mark, text, length);
        if (!text[length] || !text[length + 1])
            return;
        text += length + 1;
        prefix = mark = "";
    }
}

void report_failure(const char *node, const struct failure *failure)
{
    report_text(node, failure_message(failure));
    if (failure->hint)
        print_line("hint", ": ", failure->hint, strcspn(failure->hint, "\n"));
}

void report_notes(const char *node, const struct reply *reply)
{
    const char *note;
    for (size_t i = 0; (note = reply_note(reply, i)); i++)
        report_text(node, note);
}
