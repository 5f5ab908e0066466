"""The schema of params.yaml: strict pydantic models with every knob. Only this package reads the file."""

from pipelines.params.base import ParamsError, keyed
from pipelines.params.clip import ClipGroupParams, ClipParams, ImageTextParams, TowersParams
from pipelines.params.data import (
    AnnotatedParams,
    CaptionsParams,
    Cc3mParams,
    Cifar10Params,
    Coco2014Params,
    DataParams,
    Dataset,
    DatasetParams,
    ImageFolderParams,
    ImageNetParams,
    MixtureParams,
    ScenesParams,
    Voc2007Params,
    WaterbirdsParams,
)
from pipelines.params.evaluation import ClipEvaluateParams, EvaluateParams, LinearProbeParams, PublishedParams
from pipelines.params.gates import GateParams
from pipelines.params.methods import (
    BcosificationParams,
    BcosifyParams,
    ClassifyParams,
    DesignParams,
    DistillationParams,
    DistillParams,
    FrozenParams,
    GuidanceParams,
    GuideParams,
    PretrainParams,
    StudentParams,
)
from pipelines.params.renames import RENAMES, check_names, renamed
from pipelines.params.search import AshaParams, SearchDimension, SearchParams
from pipelines.params.training import (
    MethodParams,
    ModelParams,
    NetworkParams,
    OptimiserParams,
    StorageParams,
    TrainingParams,
)
from pipelines.params.whole import (
    Params,
    TrackingParams,
    check_space,
    leaves,
    load,
    param,
    replaced,
    validate,
)
