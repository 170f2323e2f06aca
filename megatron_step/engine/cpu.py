"""Let megatron-core run on a machine without a CUDA device; on a machine with one, do nothing.

megatron-core names CUDA in its sources: `torch.cuda.current_device()`, `device="cuda"`, `x.cuda()`,
`"torch.cuda.FloatTensor"`. An import hook rewrites the syntax trees of its modules so that these names mean the CPU;
line numbers stay. torch itself is not changed, so operations run at full speed.

    torch.cuda.X                 ->  cuda_on_cpu.X       (see cuda_on_cpu.py)
    from torch.cuda import X     ->  from megatron_step.engine.cuda_on_cpu import X
    "cuda", "cuda:N"             ->  "cpu"
    "torch.cuda.FloatTensor"     ->  "torch.FloatTensor"
    x.cuda(...)                  ->  x.cpu()
"""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import marshal
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

_PACKAGE = "megatron.core"
_NAMESPACE = "megatron_step.engine.cuda_on_cpu"
_ALIAS = "_cuda_on_cpu"


def install_import_hook() -> None:
    """Rewrite megatron-core's modules for the CPU when they are imported, if torch finds no CUDA device.

    Raises RuntimeError if megatron-core is already imported and there is no CUDA device.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if _PACKAGE in sys.modules and not _has_cuda():
        raise RuntimeError("megatron.core was imported before megatron_step: import megatron_step first")
    sys.meta_path.insert(0, _Finder())


def _has_cuda() -> bool:
    import torch  # not at the top: config and planner must stay importable without torch

    return torch.cuda.is_available()


class _Finder(MetaPathFinder):
    """Finder of megatron-core's modules that loads them with `_AdaptingLoader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _PACKAGE and not fullname.startswith(_PACKAGE + "."):
            return None
        if _has_cuda():
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        loader: Loader = _AdaptingLoader(spec.loader.name, spec.loader.path)
        return importlib.util.spec_from_file_location(
            fullname, spec.origin, loader=loader, submodule_search_locations=spec.submodule_search_locations
        )


class _AdaptingLoader(SourceFileLoader):
    """Loader that compiles a module's source with CUDA's names rewritten to the CPU's."""

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path)
        if b"cuda" not in source:
            code = super().get_code(fullname)
            assert code is not None  # a source loader always has code
            return code
        return self._cached_code(source)

    def _cached_code(self, source: bytes) -> CodeType:
        """Return the adapted code, cached beside Python's bytecode files: adapting all modules takes seconds."""
        cache = Path(importlib.util.cache_from_source(self.path, optimization="megatronstepcpu"))
        key = importlib.util.MAGIC_NUMBER + hashlib.sha256(_adapter_source() + source).digest()
        with contextlib.suppress(OSError, ValueError, EOFError, TypeError):
            content = cache.read_bytes()
            if content.startswith(key):
                code: CodeType = marshal.loads(content[len(key) :])
                return code
        code = compile(adapt(ast.parse(source, self.path)), self.path, "exec", dont_inherit=True)
        with contextlib.suppress(OSError):  # in a read-only folder there is no cache, which only costs time
            partial = cache.with_name(f"{cache.name}.{os.getpid()}")
            cache.parent.mkdir(exist_ok=True)
            partial.write_bytes(key + marshal.dumps(code))
            os.replace(partial, cache)
        return code

    def exec_module(self, module: ModuleType) -> None:
        with warnings.catch_warnings():
            # megatron-core warns that TransformerEngine and Apex are missing; both need CUDA.
            warnings.simplefilter("ignore")
            super().exec_module(module)


def adapt(tree: ast.Module) -> ast.Module:
    """Rewrite a module's syntax tree as the table at the top of this file says."""
    tree = _CudaToCpu().visit(tree)
    position = next(
        (
            index
            for index, node in enumerate(tree.body)
            if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            and not (isinstance(node, ast.ImportFrom) and node.module == "__future__")
        ),
        len(tree.body),
    )
    tree.body.insert(position, ast.Import(names=[ast.alias(name=_NAMESPACE, asname=_ALIAS)]))
    return ast.fix_missing_locations(tree)


@functools.cache
def _adapter_source() -> bytes:
    """Return the source of this file, on which the adapted code depends."""
    return Path(__file__).read_bytes()


class _CudaToCpu(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr == "cuda":
            return ast.copy_location(ast.Name(id=_ALIAS, ctx=node.ctx), node)
        self.generic_visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            moved = ast.Call(
                func=ast.Attribute(value=node.func.value, attr="cpu", ctx=ast.Load()), args=[], keywords=[]
            )
            return ast.copy_location(moved, node)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if node.module == "torch.cuda" and node.level == 0:
            node.module = _NAMESPACE
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, str):
            if node.value == "cuda" or node.value.startswith("cuda:"):
                return ast.copy_location(ast.Constant("cpu"), node)
            if node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
                return ast.copy_location(ast.Constant(node.value.replace("torch.cuda.", "torch.")), node)
        return node
