-- Plans: what a subscription allows, and who has which.

-- Tables
-- ------

create table public.plans (
    id bigint generated always as identity primary key,
    slug text not null unique check (slug ~ '^[a-z0-9][a-z0-9-]{0,62}$'),
    name text not null check (length(name) between 1 and 100),
    description text not null default '',
    price_per_month_nanos bigint not null default 0 check (price_per_month_nanos >= 0),
    daily_request_limit bigint check (daily_request_limit >= 0),
    monthly_request_limit bigint check (monthly_request_limit >= 0),
    daily_token_limit bigint check (daily_token_limit >= 0),
    monthly_token_limit bigint check (monthly_token_limit >= 0),
    concurrency integer check (concurrency >= 0),
    features text[] not null default '{}',
    allowed_models text[],
    environment_factors jsonb not null default '{"staging": 1, "development": 1}'
        check (jsonb_typeof(environment_factors) = 'object'),
    is_active boolean not null default true,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
comment on table public.plans is
    'What a subscription allows; null is unlimited, zero refuses all. "free" and "pay-as-you-go" apply '
    'without a subscription.';
alter table public.plans enable row level security;
revoke all on public.plans from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.plans to service_role;
revoke all on sequence public.plans_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.plans_id_seq to service_role;
insert into public.plans (
    slug, name, description, daily_request_limit, monthly_request_limit, daily_token_limit,
    monthly_token_limit)
values ('free', 'Free', 'What an account without a plan and without bought or granted credits may use.',
        100, 1000, 10000, 100000),
       ('pay-as-you-go', 'Pay as you go', 'Prepaid credits without a plan: rate limits only.',
        null, null, null, null);

create table public.user_plans (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    plan_id bigint not null references public.plans (id),
    start_date timestamptz not null,
    end_date timestamptz not null,
    is_active boolean not null default true,
    created_at timestamptz not null default now(),
    constraint user_plans_in_order check (start_date < end_date)
);
create unique index user_plans_one_active on public.user_plans (user_id) where is_active;
comment on index public.user_plans_one_active is 'A user has one plan at a time; the others are history.';
create index user_plans_plan_idx on public.user_plans (plan_id);
create index user_plans_user_idx on public.user_plans (user_id);
alter table public.user_plans enable row level security;
revoke all on public.user_plans from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.user_plans to service_role;
revoke all on sequence public.user_plans_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.user_plans_id_seq to service_role;

-- Built-in rows
-- -------------

-- Some rows apply to everybody who has none of their own: two plans, and the default limits (08_limits.sql).
-- Without them nothing would be limited.
create function public.refuse_built_in_change() returns trigger language plpgsql set search_path = '' as $$
begin
    raise exception '% of a built-in row of % is refused: it applies to everybody without one of their own',
        lower(tg_op), tg_table_name
        using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_built_in_change() from public, anon, authenticated;
grant execute on function public.refuse_built_in_change() to service_role;

create trigger plans_built_in_stay before delete on public.plans
    for each row when (old.slug in ('free', 'pay-as-you-go'))
    execute function public.refuse_built_in_change();

create trigger plans_built_in_keep_their_slug before update of slug, is_active on public.plans
    for each row when (old.slug in ('free', 'pay-as-you-go') and (new.slug <> old.slug or not new.is_active))
    execute function public.refuse_built_in_change();

create trigger plans_no_truncate before truncate on public.plans
    for each statement execute function public.refuse_built_in_change();

-- Which plan applies
-- ------------------

-- The plan that applies: the one assigned for this moment, else a built-in one.
create function public.current_plan(p_user public.users, p_now timestamptz) returns public.plans
language plpgsql stable as $$
declare
    v_plan public.plans;
begin
    select p.* into v_plan from public.user_plans up join public.plans p on p.id = up.plan_id
    where up.user_id = p_user.id and up.is_active and up.start_date <= p_now and p_now < up.end_date limit 1;
    if not found then
        select p.* into v_plan from public.plans p
        where p.slug = case when p_user.is_funded then 'pay-as-you-go' else 'free' end;
    end if;
    return v_plan;
end $$;
revoke all on function public.current_plan(public.users, timestamptz) from public, anon, authenticated;
grant execute on function public.current_plan(public.users, timestamptz) to service_role;

-- Administration
-- --------------

-- p: plan {...}. Outcomes: created, slug_taken.
create function public.create_plan(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_plan public.plans := jsonb_populate_record(null::public.plans, p -> 'plan');
begin
    insert into public.plans (
        slug, name, description, price_per_month_nanos, daily_request_limit, monthly_request_limit,
        daily_token_limit, monthly_token_limit, concurrency, features, allowed_models, environment_factors)
    values (v_plan.slug, v_plan.name, v_plan.description, v_plan.price_per_month_nanos,
            v_plan.daily_request_limit, v_plan.monthly_request_limit, v_plan.daily_token_limit,
            v_plan.monthly_token_limit, v_plan.concurrency, v_plan.features, v_plan.allowed_models,
            v_plan.environment_factors)
    on conflict (slug) do nothing returning * into v_plan;
    if not found then
        return jsonb_build_object('outcome', 'slug_taken');
    end if;
    perform public.write_audit(
        p ->> 'actor', 'create_plan', 'plan:' || v_plan.id, null, null, p ->> 'address', p ->> 'user_agent',
        (p ->> 'request_id')::uuid, p -> 'plan');
    return jsonb_build_object('outcome', 'created', 'plan', to_jsonb(v_plan));
end $$;
revoke all on function public.create_plan(jsonb) from public, anon, authenticated;
grant execute on function public.create_plan(jsonb) to service_role;

-- p: plan_id, changes {...}. is_active false takes a plan off the list; those who have it keep it.
-- Outcomes: updated, not_found, built_in.
create function public.update_plan(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_plan public.plans;
begin
    select * into v_plan from public.plans where id = (p ->> 'plan_id')::bigint for update;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_plan := jsonb_populate_record(v_plan, p -> 'changes');
    if not v_plan.is_active and v_plan.slug in ('free', 'pay-as-you-go') then
        return jsonb_build_object('outcome', 'built_in');
    end if;
    update public.plans set name = v_plan.name, description = v_plan.description,
        price_per_month_nanos = v_plan.price_per_month_nanos,
        daily_request_limit = v_plan.daily_request_limit,
        monthly_request_limit = v_plan.monthly_request_limit, daily_token_limit = v_plan.daily_token_limit,
        monthly_token_limit = v_plan.monthly_token_limit, concurrency = v_plan.concurrency,
        features = v_plan.features, allowed_models = v_plan.allowed_models,
        environment_factors = v_plan.environment_factors, is_active = v_plan.is_active,
        updated_at = clock_timestamp()
    where id = v_plan.id returning * into v_plan;
    perform public.write_audit(
        p ->> 'actor', 'update_plan', 'plan:' || v_plan.id, null, null, p ->> 'address', p ->> 'user_agent',
        (p ->> 'request_id')::uuid, p -> 'changes');
    return jsonb_build_object('outcome', 'updated', 'plan', to_jsonb(v_plan));
end $$;
revoke all on function public.update_plan(jsonb) from public, anon, authenticated;
grant execute on function public.update_plan(jsonb) to service_role;

-- p: user_id or hashes, plan_id, duration_months. Outcomes: those of assign_plan_at.
create function public.assign_plan(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    -- Locked before the clock is read, so that a plan never begins before the one it replaces.
    v_user public.users := public.lock_target(p);
begin
    return public.assign_plan_at(p, clock_timestamp());
end $$;
revoke all on function public.assign_plan(jsonb) from public, anon, authenticated;
grant execute on function public.assign_plan(jsonb) to service_role;

-- Months are those of the calendar, in UTC. Outcomes: assigned, not_found, plan_not_found.
create function public.assign_plan_at(p jsonb, p_now timestamptz) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_plan public.plans;
    v_end timestamptz := (p_now at time zone 'UTC' + make_interval(months => (p ->> 'duration_months')::int))
                         at time zone 'UTC';
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    select * into v_plan from public.plans where id = (p ->> 'plan_id')::bigint and is_active;
    if not found then
        return jsonb_build_object('outcome', 'plan_not_found');
    end if;
    update public.user_plans set is_active = false,
        end_date = greatest(least(end_date, p_now), start_date + interval '1 microsecond')
    where user_id = v_user.id and is_active;
    insert into public.user_plans (user_id, plan_id, start_date, end_date)
    values (v_user.id, v_plan.id, p_now, v_end);
    perform public.activate_subscription(v_user.id, false);
    perform public.write_audit(
        p ->> 'actor', 'assign_plan', 'user:' || v_user.id, v_user.id, null, p ->> 'address',
        p ->> 'user_agent', (p ->> 'request_id')::uuid,
        jsonb_build_object('plan_id', v_plan.id, 'until', v_end));
    return jsonb_build_object(
        'outcome', 'assigned', 'user_id', v_user.id, 'plan_id', v_plan.id, 'plan_name', v_plan.name,
        'end_date', v_end);
end $$;
revoke all on function public.assign_plan_at(jsonb, timestamptz) from public, anon, authenticated;
grant execute on function public.assign_plan_at(jsonb, timestamptz) to service_role;

-- A plan or credits end the trial. Credits also end the free plan's limits (is_funded).
create function public.activate_subscription(p_user_id bigint, p_funded boolean) returns void
language sql set search_path = '' as $$
    update public.users set subscription_status = 'active', is_funded = is_funded or p_funded,
        updated_at = clock_timestamp()
    where id = p_user_id
$$;
revoke all on function public.activate_subscription(bigint, boolean) from public, anon, authenticated;
grant execute on function public.activate_subscription(bigint, boolean) to service_role;

-- p: user_id. Outcomes: cancelled, no_plan.
create function public.cancel_plan(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_plan public.user_plans;
    v_now timestamptz := clock_timestamp();
begin
    update public.user_plans set is_active = false,
        end_date = greatest(least(end_date, v_now), start_date + interval '1 microsecond')
    where user_id = v_user.id and is_active and v_now < end_date returning * into v_plan;
    if not found then
        return jsonb_build_object('outcome', 'no_plan');
    end if;
    update public.users set subscription_status = 'cancelled', updated_at = v_now where id = v_user.id;
    perform public.write_audit(
        p ->> 'actor', 'cancel_plan', 'user:' || v_user.id, v_user.id, null, p ->> 'address',
        p ->> 'user_agent', (p ->> 'request_id')::uuid, jsonb_build_object('plan_id', v_plan.plan_id));
    return jsonb_build_object('outcome', 'cancelled', 'plan_id', v_plan.plan_id);
end $$;
revoke all on function public.cancel_plan(jsonb) from public, anon, authenticated;
grant execute on function public.cancel_plan(jsonb) to service_role;
