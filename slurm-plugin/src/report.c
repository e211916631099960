#include "report.h"

#include "spank_wrap.h"

#include <stdint.h>
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

#define HASH_DIGITS 16

/* FNV-1a, 64 bits: two notes that collide cost a line of text. */
static uint64_t hash_of(const char *text)
{
    uint64_t hash = 0xcbf29ce484222325u;
    for (; *text; text++)
        hash = (hash ^ (unsigned char)*text) * 0x100000001b3u;
    return hash;
}

bool report_notes(const char *node, const struct reply *reply, const char *seen, char **shown)
{
    const char *note;
    size_t size;
    char *text = NULL;
    FILE *out = shown ? open_memstream(&text, &size) : NULL;
    if (shown && !out)
        return false;
    for (size_t i = 0; (note = reply_note(reply, i)); i++) {
        char digits[HASH_DIGITS + 1];
        snprintf(digits, sizeof digits, "%0*llx", HASH_DIGITS, (unsigned long long)hash_of(note));
        if (!seen || !strstr(seen, digits))
            report_text(node, note);
        if (out)
            fprintf(out, "%s%s", i ? "," : "", digits);
    }
    if (out && fclose(out) != 0) {
        free(text);
        return false;
    }
    if (shown)
        *shown = text;
    return true;
}
