# /etc/profile.d/zz-uenvd.sh (part of uenvd)
#
# A login shell inside a uenv session or job step puts the lists of the views back (PATH and its like), which /etc/profile has reset.
#
# $UENV_RESTORE (uenvd/views.py: restore_op) has records NAME=a:b (to be put before) and NAME+=a:b (after), separated by "|". An element that
# is there already stays where it is, as in every step. Only the kernel's word counts for being in a session. Works in every POSIX shell.

if [ -n "${UENV_RESTORE-}" ] && grep -q ' - fuse[^ ]* uenvd:' /proc/self/mountinfo 2>/dev/null; then
    _uenvd_rest=$UENV_RESTORE'|'
    while [ -n "$_uenvd_rest" ]; do
        _uenvd_record=${_uenvd_rest%%'|'*}
        _uenvd_rest=${_uenvd_rest#*'|'}
        _uenvd_name=${_uenvd_record%%=*}
        _uenvd_values=${_uenvd_record#*=}:
        _uenvd_place=before
        case $_uenvd_record in
        *=*) ;;
        *) continue ;;
        esac
        case $_uenvd_name in
        *+) _uenvd_name=${_uenvd_name%+} _uenvd_place=after ;;
        esac
        case $_uenvd_name in
        '' | [0-9]* | *[!A-Za-z0-9_]*) continue ;;
        esac
        eval "_uenvd_there=\${$_uenvd_name-}"
        _uenvd_missing=
        while [ -n "$_uenvd_values" ]; do
            _uenvd_element=${_uenvd_values%%:*}
            _uenvd_values=${_uenvd_values#*:}
            case ":$_uenvd_there:$_uenvd_missing:" in
            *":$_uenvd_element:"*) ;;
            *) _uenvd_missing=${_uenvd_missing:+$_uenvd_missing:}$_uenvd_element ;;
            esac
        done
        if [ -n "$_uenvd_missing" ]; then
            if [ -z "$_uenvd_there" ]; then
                _uenvd_there=$_uenvd_missing
            elif [ "$_uenvd_place" = before ]; then
                _uenvd_there=$_uenvd_missing:$_uenvd_there
            else
                _uenvd_there=$_uenvd_there:$_uenvd_missing
            fi
            eval "export $_uenvd_name=\"\$_uenvd_there\""
        fi
    done
    unset _uenvd_rest _uenvd_record _uenvd_name _uenvd_values _uenvd_place _uenvd_there _uenvd_missing _uenvd_element
fi
