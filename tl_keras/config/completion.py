"""Completion scripts for shells, made from the settings."""

from __future__ import annotations

from tl_keras.config.flags import GENERAL
from tl_keras.config.settings import MODES, list_fields
from tl_keras.errors import UserError

_BASH = """\
# tl_keras completion for bash: source <(tl_keras completion bash)
_tl_keras() {{
    local line="${{COMP_LINE:0:COMP_POINT}}"
    local current="${{line##* }}" mode="${{COMP_WORDS[1]}}" words
    COMPREPLY=()
    if [[ "$line" =~ ^[^\\ ]+\\ +[^\\ ]*$ && "$current" != -* ]]; then
        COMPREPLY=($(compgen -W "{modes} completion" -- "$current"))
        return
    fi
    [[ "$line" =~ --mode[=\\ ]([a-z]+) ]] && mode="${{BASH_REMATCH[1]}}"
    case "$current" in
{choices}
        --*=*) COMPREPLY=($(compgen -f -- "${{current#*=}}")); return ;;
    esac
    case "$mode" in
{flags}
        *) words="--mode= {general}" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    [[ ${{#COMPREPLY[@]}} -eq 1 && "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace
}}
complete -F _tl_keras tl_keras
"""


def completion(shell: str) -> str:
    """The completion script of a shell.

    Args:
        shell: `bash`, `zsh` or `fish`.

    Raises:
        UserError: another shell.
    """
    if shell == "bash":
        return _complete_bash()
    if shell == "zsh":  # zsh runs bash's functions
        return "autoload -U +X bashcompinit && bashcompinit\n" + _complete_bash().replace(
            "completion bash", "completion zsh"
        )
    if shell == "fish":
        return _complete_fish()
    fault = f"{shell!r} is not a known shell" if shell else "no shell is named"
    raise UserError(f"completion: {fault}. Allowed: bash, zsh, fish.")


def _complete_bash() -> str:
    choices = "\n".join(
        f'        --{field.name}=*) COMPREPLY=($(compgen -W "{" ".join(field.metadata["choices"])}" -- '
        '"${current#*=}")); return ;;'
        for _, field in list_fields()
        if field.metadata["choices"]
    )
    flags = "\n".join(f'        {mode}) words="{" ".join(_list_flags(mode))}" ;;' for mode in MODES)
    return _BASH.format(modes=" ".join(MODES), choices=choices, flags=flags, general=" ".join(_list_general()))


def _list_general() -> list[str]:
    return ["--flagfile=", "--help", "--help=all", *(f"--{name}" for name in GENERAL)]


def _list_flags(mode: str) -> list[str]:
    found = []
    for _, field in list_fields(mode):
        if isinstance(field.default, bool):
            found += [f"--no{field.name}"] if field.default else [f"--{field.name}"]
        else:
            found.append(f"--{field.name}=")
    return [*found, *_list_general()]


def _complete_fish() -> str:
    lines = ["# tl_keras completion for fish: tl_keras completion fish | source", "complete -c tl_keras -f"]
    for mode, text in MODES.items():
        lines.append(f"complete -c tl_keras -n __fish_use_subcommand -a {mode} -d {_quote(text)}")
    for _, field in list_fields():
        modes, choices = " ".join(field.metadata["modes"]), " ".join(field.metadata["choices"])
        line = f"complete -c tl_keras -n '__fish_seen_subcommand_from {modes}' -d {_quote(field.metadata['help'])}"
        if isinstance(field.default, bool):
            lines.append(f"{line} -l {'no' if field.default else ''}{field.name}")
        else:
            lines.append(f"{line} -l {field.name} -r" + (f" -f -a {_quote(choices)}" if choices else " -F"))
    lines += [f"complete -c tl_keras -l {name} -d {_quote(text)}" for name, text in GENERAL.items()]
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
