#include "submit.h"

#include "environ.h"
#include "exchange.h"
#include "report.h"
#include "session.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define HINT_HETEROGENEOUS "give every component the same, or start the parts as steps of their own: srun --het-group=N --uenv=..."

/* Variables by which a user chooses for all his jobs; the first that is set counts. */
static const struct inputs {
    const char *uenv;
    const char *views[3];
} inputs[] = {
    [PROGRAM_SRUN] = {VAR_SRUN_UENV, {VAR_SRUN_VIEW, "SLURM_VIEW", NULL}},
    [PROGRAM_SBATCH] = {"SBATCH_UENV", {"SBATCH_UENV_VIEW", "SBATCH_VIEW", NULL}},
    [PROGRAM_SALLOC] = {"SALLOC_UENV", {"SALLOC_UENV_VIEW", "SALLOC_VIEW", NULL}},
};

static struct {
    int components;  /* settled so far */
    bool unresolved;
} submission;

/* What is to be submitted. The texts are borrowed: from the options, the environment or the session. */
struct plan {
    enum { FROM_NOWHERE, FROM_OPTION, FROM_VARIABLE, FROM_SESSION, FROM_JOB } origin;
    const char *spec;   /* NULL: FROM_NOWHERE */
    const char *images; /* known already, NULL: to be asked for */
    const char *checked_view; /* that uenvd has accepted for `images` */
    const char *view;
};

/* What the enclosing job was given, according to its variables. */
struct job_texts {
    const char *spec;
    const char *images;
    const char *view;
};

static const char *variable(const char *name)
{
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

static bool same(const char *a, const char *b)
{
    return a == b || (a && b && !strcmp(a, b));
}

/* Whether an image is named by a path that means another file in another directory. */
static bool has_relative_path(const char *spec)
{
    for (; spec; spec = strchr(spec, ',') ? strchr(spec, ',') + 1 : NULL)
        if (spec[strspn(spec, " \t")] == '.')
            return true;
    return false;
}

/* ---- what is left for the job */

static bool export(const char *name, const char *value, struct failure *failure)
{
    if (value && strlen(name) + 1 + strlen(value) > MAX_ENV_STRING_BYTES)
        return failure_set(failure, CODE_USAGE, "name fewer images", "the list of images is too long for a job's environment");
    if ((value ? setenv(name, value, 1) : unsetenv(name)) < 0)
        return failure_set(failure, CODE_INTERNAL, NULL, "cannot set %s: %s", name, strerror(errno));
    return true;
}

/* The texts may lie in the environment that this changes. `delivered` is the option as Slurm itself hands it to the job. */
static bool export_all(const char *spec, const char *images, const char *view, const char *delivered, struct failure *failure)
{
    const char *instead = delivered && !same(delivered, spec) ? delivered : NULL;
    const char *texts[] = {spec, images, view, instead};
    char *own[4] = {0};
    bool fine = true;
    for (size_t i = 0; i < 4; i++) {
        own[i] = texts[i] ? strdup(texts[i]) : NULL;
        fine = fine && (own[i] || !texts[i]);
    }
    fine = fine ? export(VAR_SPEC, own[0], failure) && export(VAR_IMAGES, own[1], failure) && export(VAR_VIEW, own[2], failure) &&
                      export(VAR_OPTION_UENV, own[0], failure) && export(VAR_OPTION_VIEW, own[2], failure) &&
                      export(VAR_INSTEAD_OF, own[3], failure) && export(VAR_SRUN_UENV, own[0], failure) &&
                      export(VAR_SRUN_VIEW, own[2], failure)
                : failure_memory(failure);
    for (size_t i = 0; i < 4; i++)
        free(own[i]);
    return fine;
}

bool submit_export_images(const char *images, struct failure *failure)
{
    return export(VAR_IMAGES, images, failure);
}

/* The shell of salloc stays among the mounts in which salloc was started; a batch script never runs there. */
static bool export_place(enum program program, const struct session *session, struct failure *failure)
{
    if (program == PROGRAM_SRUN)
        return true;
    char *here = program == PROGRAM_SALLOC && session->count > 0 ? session_place() : NULL;
    bool fine = export(VAR_SESSION, here, failure);
    free(here);
    return fine;
}

void submit_forget(void)
{
    submission.components = 0;
    submission.unresolved = false;
}

bool submit_is_unresolved(void)
{
    return submission.unresolved;
}

/* ---- what is asked for */

static bool is_here(const char *place)
{
    char *here = place ? session_place() : NULL;
    bool equal = same(place, here) && here;
    free(here);
    return equal;
}

/* The option counts before the variable, the variable before what is inherited; of the inherited, the mounts before variables. */
static void make_plan(const struct choice *choice, const struct inputs *input, const struct session *session, struct plan *plan)
{
    struct job_texts job = {variable(VAR_SPEC), variable(VAR_IMAGES), variable(VAR_VIEW)};
    const char *replaced = variable(VAR_INSTEAD_OF), *uenv = variable(input->uenv), *view = NULL;
    for (size_t i = 0; !view && input->views[i]; i++)
        view = variable(input->views[i]);
    bool uenv_typed = choice->uenv.text && !choice->uenv.inherited, view_typed = choice->view.text && !choice->view.inherited;
    /* What the plugin itself exported for the job is no wish of the user's. */
    if (same(uenv, job.spec))
        uenv = NULL;
    const char *preset = choice->uenv.inherited && !same(choice->uenv.text, job.spec) && !same(choice->uenv.text, replaced)
                             ? choice->uenv.text
                             : NULL;
    const char *preset_view = preset && choice->view.inherited ? choice->view.text : NULL;
    /* What is mounted counts, unless it is only what the job was asked for from, or what the job itself has. */
    bool in_session = session->count > 0 && !(job.images && session_matches(session, job.images)) &&
                      !(job.spec && is_here(variable(VAR_SESSION)));
    if (in_session)
        job = (struct job_texts){0};
    *plan = (struct plan){.origin = FROM_NOWHERE};
    if (uenv_typed) {
        plan->origin = FROM_OPTION;
        plan->spec = choice->uenv.text;
    } else if (uenv || preset) {
        plan->origin = FROM_VARIABLE;
        plan->spec = uenv ? uenv : preset;
        plan->view = uenv ? view : preset_view;
    } else if (in_session) {
        plan->origin = FROM_SESSION;
    } else if (job.spec) {
        plan->origin = FROM_JOB;
        plan->spec = job.spec;
        plan->view = view && !same(view, job.view) ? view : NULL;
    }
    /* A job's own sruns get the images that the job got, even where the tag has moved or no daemon answers. */
    if (job.images && same(plan->spec, job.spec) && !(uenv_typed && has_relative_path(plan->spec))) {
        plan->images = job.images;
        plan->checked_view = job.view;
        if (!plan->view)
            plan->view = job.view;
    } else if (plan->origin == FROM_JOB && !plan->view) {
        plan->view = job.view;
    }
    if (view_typed)
        plan->view = choice->view.text;
}

static bool refuse_component(const char *option, const char *first, const char *later, struct failure *failure)
{
    return failure_set(failure, CODE_USAGE, HINT_HETEROGENEOUS,
                       "the components of a heterogeneous job cannot have different environments, because Slurm knows only one for all: "
                       "the first has %s%s%s%s, another --%s=%s",
                       first ? "--" : "no --", option, first ? "=" : "", first ? first : "", option, later);
}

/* A later component may repeat what the first has settled. */
static bool check_component(const struct choice *choice, struct failure *failure)
{
    const char *spec = variable(VAR_SPEC), *view = variable(VAR_VIEW);
    if (choice->uenv.text && !choice->uenv.inherited && !same(choice->uenv.text, spec))
        return refuse_component("uenv", spec, choice->uenv.text, failure);
    if (choice->view.text && !choice->view.inherited && !same(choice->view.text, view))
        return refuse_component("view", view, choice->view.text, failure);
    return true;
}

/* ---- uenvd */

/* A description list as a human wants to read it, to be freed. */
static char *without_digests(const char *images)
{
    char *text = strdup(images), *to = text;
    for (const char *from = images; text && *from;) {
        size_t digits = !strncmp(from, "@sha256:", 8) ? strspn(from + 8, "0123456789abcdef") : 0;
        if (digits == 64)
            from += 8 + 64;
        else
            *to++ = *from++;
    }
    if (text)
        *to = '\0';
    return text;
}

static void say(const char *before, const char *images, const char *after)
{
    char *plain = without_digests(images), *text = NULL;
    if (plain && asprintf(&text, "%s%s%s", before, plain, after) >= 0)
        report_text(NULL, text);
    free(text);
    free(plain);
}

static bool is_absent(const struct failure *failure)
{
    return failure->code && !strcmp(failure->code, CODE_ABSENT);
}

/* Ask uenvd what `uenv` means, now, and export it as the meaning of `spec` (NULL: of its own digests). */
static bool resolve(const struct plugin *plugin, const char *spec, const char *uenv, const char *view, const char *delivered,
                    struct failure *failure)
{
    struct request request = REQUEST_EMPTY;
    char *directory = getcwd(NULL, 0);
    request.op = "resolve";
    request.submit = true;
    request.uenv = uenv;
    request.view = view;
    request.cwd = directory;
    struct client client = CLIENT_CLOSED;
    struct reply reply = REPLY_NONE;
    const char *images = NULL;
    struct patience patience = {.total_ms = plugin->settings.timeout_ms};
    bool fine = exchange(&client, &plugin->settings, &request, patience, NULL, NULL, &reply, failure);
    if (fine) {
        char *noted = NULL;
        fine = reply_resolved(&reply, &images, failure) && (report_notes(NULL, &reply, NULL, &noted) || failure_memory(failure)) &&
               export(VAR_NOTED, noted && *noted ? noted : NULL, failure) && export_all(spec ? spec : images, images, view, delivered, failure);
        free(noted);
    } else if (plugin->settings.login_optional && is_absent(failure)) {
        failure_clear(failure);
        submission.unresolved = true;
        fine = export(VAR_NOTED, NULL, failure) && export_all(spec ? spec : uenv, NULL, view, delivered, failure);
        if (fine)
            say("no uenvd here: the job's first node looks ", spec ? spec : uenv, " up");
    }
    reply_free(&reply);
    client_close(&client);
    free(directory);
    return fine;
}

static void note_inheritance(const struct plan *plan, enum program program, bool in_session)
{
    if (plan->origin == FROM_VARIABLE && in_session && strcmp(plan->spec, SPEC_NONE))
        say("a variable goes before what this session has mounted: ", plan->spec, "");
    const char *images = variable(VAR_IMAGES) ? variable(VAR_IMAGES) : variable(VAR_SPEC);
    if (program == PROGRAM_SRUN || !images)
        return;
    if (plan->origin == FROM_SESSION)
        say("inherited from this session: ", images, " (none of it with --uenv=none)");
    else if (plan->origin == FROM_JOB)
        say("inherited from this job: ", images, " (none of it with --uenv=none)");
}

static bool carry_out(const struct plugin *plugin, const struct choice *choice, const struct plan *plan, const struct session *session,
                      struct failure *failure)
{
    const char *delivered = choice->uenv.delivered;
    if (plan->spec && !strcmp(plan->spec, SPEC_NONE)) {
        if (choice->view.text && !choice->view.inherited)
            return failure_set(failure, CODE_USAGE, "leave out --view, or name an image", "--uenv=none has no views");
        return export_all(SPEC_NONE, NULL, NULL, delivered, failure);
    }
    if (plugin->config.set)
        return failure_set(failure, CODE_CONFIG, plugin->config.hint, "%s", failure_message(&plugin->config));
    if (plan->origin == FROM_SESSION) {
        char *uenv = session_describe(session), *view = plan->view ? strdup(plan->view) : session_views(session, getenv("UENV_VIEW"));
        bool fine = uenv && view ? resolve(plugin, NULL, uenv, view, delivered, failure) : failure_memory(failure);
        free(uenv);
        free(view);
        return fine;
    }
    if (!plan->images)
        return resolve(plugin, plan->spec, plan->spec, plan->view, delivered, failure);
    if (!same(plan->view, plan->checked_view))
        return resolve(plugin, plan->spec, plan->images, plan->view, delivered, failure);
    return export_all(plan->spec, plan->images, plan->view, delivered, failure);
}

static bool settle(const struct plugin *plugin, const struct choice *choice, enum program program, struct failure *failure)
{
    struct session session;
    struct plan plan;
    if (choice->memory)
        return failure_memory(failure);
    if (submission.components > 0)
        return check_component(choice, failure);
    if (!session_read(&session, failure))
        return false;
    make_plan(choice, &inputs[program], &session, &plan);
    bool fine = true;
    if (plan.origin != FROM_NOWHERE) {
        fine = carry_out(plugin, choice, &plan, &session, failure) && export_place(program, &session, failure);
        if (fine)
            note_inheritance(&plan, program, session.count > 0);
    } else if (choice->view.text && !choice->view.inherited) {
        fine = failure_set(failure, CODE_USAGE, "add --uenv=LABEL", "--view needs an image");
    }
    session_free(&session);
    return fine;
}

bool submit_resolve(const struct plugin *plugin, struct choice *choice, enum program program)
{
    if (variable(VAR_LOOKUP))
        return true; /* our own helper step: everything is in its variables */
    struct failure failure = FAILURE_NONE;
    bool fine = settle(plugin, choice, program, &failure);
    if (!fine)
        report_failure(NULL, &failure);
    failure_clear(&failure);
    choice_clear(choice);
    submission.components++;
    return fine;
}
