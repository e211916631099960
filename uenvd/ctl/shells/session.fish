# Read by fish of a session after the user's own files: the session in the prompt.

functions --query fish_prompt; or fish_prompt 2>/dev/null >/dev/null
functions --copy fish_prompt _uenvd_own_prompt
function fish_prompt
    printf '%s' $_uenvd_prompt
    _uenvd_own_prompt
end
