/* srun, as the user. It blocks SIGINT and SIGTERM in its callbacks: everything here ends by a deadline. */
#include "contexts.h"
#include "lookup.h"
#include "report.h"
#include "spank_wrap.h"
#include "submit.h"

int local_init_post_opt(const struct plugin *plugin, struct choice *choice)
{
    return submit_resolve(plugin, choice, PROGRAM_SRUN) ? 0 : -1;
}

int local_user_init(spank_t spank)
{
    uint32_t job;
    struct failure failure = FAILURE_NONE;
    if (!submit_is_unresolved())
        return 0;
    bool fine = sw_job(spank, &job) ? lookup_on_first_node(job, &failure)
                                    : failure_set(&failure, CODE_INTERNAL, NULL, "Slurm does not say which job this is");
    if (!fine)
        report_failure(NULL, &failure);
    failure_clear(&failure);
    return fine ? 0 : -1;
}
